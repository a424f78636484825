"""Pruned networks outside of a run: files, ONNX, latency."""
