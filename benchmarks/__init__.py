"""Benchmarks of kldiv_ext against what people use today: `python -m benchmarks`."""
