"""Benchmarks of trained models: every way to answer the same samples, its quality, its time and where that goes."""
