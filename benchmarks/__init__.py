"""Benchmarks of the ops and small-scale reproductions of the papers."""
