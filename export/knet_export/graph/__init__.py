"""The deploy form as ONNX files, and the check that they are still the function."""
