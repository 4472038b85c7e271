"""Which bars of a workload are met here: `python -m suites.benchmarks.bars`."""
