"""Measurements of one GPU in five parts: `bash benchmarks/gpu.sh`."""
