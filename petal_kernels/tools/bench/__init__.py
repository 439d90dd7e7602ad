"""Benchmarks of operators, layers and whole models against their eager forms."""
