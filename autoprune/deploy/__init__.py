"""Pruned networks outside of a run: files and ONNX."""
