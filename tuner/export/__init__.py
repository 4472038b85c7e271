"""Tuned results in other projects' formats: one file per target, each a pure function from ours to text."""
