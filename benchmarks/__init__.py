"""Benchmarks. Each module is a command: `python -m benchmarks.throughput --backend sqlite`."""
