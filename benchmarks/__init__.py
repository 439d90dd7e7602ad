"""Benchmarks: ``python -m benchmarks.run``; results are committed under ``results/``."""
