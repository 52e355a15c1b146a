"""Benchmarks: ``benchmarks.run`` times the ops, ``benchmarks.papers`` repeats the papers at small scale."""
