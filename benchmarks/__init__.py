"""gdlib beside its peers and this machine's limits, on the same arrays in the same run: `python -m benchmarks.report`, or by pytest."""
