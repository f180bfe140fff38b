"""TensorRT plans, built on the device or ahead of time, and looked into."""
