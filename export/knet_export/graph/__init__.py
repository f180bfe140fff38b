"""The fused model as ONNX files, and the check that they are still the function."""
