"""What the gather and MLP tests share: where they run, poisoned memory, graphs and streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES) if torch.cuda.is_available() else (torch.float32, torch.float16)
"""The interpreter's bfloat16 products are wrong, so there bfloat16 waits for a GPU."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN within, so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def replay(function: Callable[[], object]) -> None:
    """Run once to compile, then capture in a CUDA graph and replay that once."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()


def on_side_stream(function: Callable[[], object]) -> None:
    """Run on a stream of its own, behind work that a launch on any other stream would overtake."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        function()
    stream.synchronize()
