"""The method: policies, step clock, attention and MLP deltas, token order, report."""
