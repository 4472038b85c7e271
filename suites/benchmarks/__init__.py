"""Benchmarks of every operation beside its dense baseline.

`pytest suites/benchmarks [--workload NAME] [--backend NAME|all]` records what dispatch, or any backend, does
today. `python -m suites.benchmarks.bars` says which bars of a workload are met on this machine,
`python -m suites.benchmarks.sanitize` runs every kernel for a sanitizer to watch.
"""
