"""Triton's kernels with partitions, built so that compute-sanitizer's racecheck can follow them.

Triton hands out partitions by bytes in shared memory, between barriers of all warps. racecheck (2025.3.1)
loses the first such barrier that follows one which only some of the warps passed, as happens in every
partition. Plain CUDA shows the same: it reports warps that read a byte between barriers of all while others
pass one of their own and then write it, but no longer with each barrier of all twice, or with as many of
their own on either side (results/notes/2026-11-29-gluon.md). A second barrier right after another orders
nothing more, so it hides no race.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BARRIER_OF_ALL = re.compile(r"(barrier\.sync\s+1;)")


@contextmanager
def handing_out_twice() -> Iterator[None]:
    """Within it Triton builds each barrier of all warps twice, in a cache of its own that goes with it.

    Of its own because Triton 3.6 does not tell such builds from others.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.runtime.scope():
        knobs.cache.dir = folder
        knobs.runtime.add_stages_inspection_hook = _hook
        yield


def twice(ptx: str) -> str:
    """The same code with each barrier of all warps twice."""
    return BARRIER_OF_ALL.sub(r"\1\n\t\1", ptx)


def _hook(backend: Any = None, stages: Any = None, *others: Any) -> tuple[str, str]:
    """Triton asks without arguments what tells builds apart (3.7), with them for changes of stages."""
    if stages is not None:
        build = stages["ptx"]
        stages["ptx"] = lambda source, metadata: twice(build(source, metadata))
    return "barriers twice", "barriers twice"
