"""Benchmarks of every operation beside its dense baseline: `pytest suites/benchmarks [--workload NAME]`."""
