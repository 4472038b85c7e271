"""How launches reach Triton: binaries remembered by all they depend on, settings that would slow a launch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from chipmunk_kernels.backends.triton import colsum_attention, dense_attention, launch, sparse_attention
from chipmunk_kernels.backends.triton.launch import Launcher, overlaps, register_cap
from tests.factories import attention_inputs, scattered_columns

CPU = torch.device("cpu")


class Recorder:
    """Stands in for a jit function and for its binaries; keeps the arguments of every launch of either."""

    def __init__(self) -> None:
        self.analysed: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            self.analysed.append((args, named))
            return Binary(self)

        return run


class Binary:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.recorder.direct.append(args)


def operations() -> dict[str, tuple[Any, Callable[[], object]]]:
    q, k, v = attention_inputs(1, 2, 40, 50, 32)
    lse, columns = torch.zeros(1, 2, 40), scattered_columns(1, 2, 40, 50, 32)
    return {
        "sparse": (
            sparse_attention,
            lambda: sparse_attention.sparse_attention(
                q, k, v, columns, q, 1, 0.5, sparse_attention.SparseAttentionSettings()
            ),
        ),
        "dense": (
            dense_attention,
            lambda: dense_attention.dense_attention(
                q, k, v, None, 0.5, dense_attention.DenseAttentionSettings()
            ),
        ),
        "colsum": (
            colsum_attention,
            lambda: colsum_attention.colsum_attention(
                q, k, v, lse, 32, None, 0.5, colsum_attention.ColsumAttentionSettings()
            ),
        ),
    }


@pytest.mark.parametrize("operation", ["sparse", "dense", "colsum"])
def test_a_binary_gets_the_arguments_in_the_kernels_order(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A binary takes all by position, so the constants must stand where the kernel declares them."""
    module, call = operations()[operation]
    recorder, names = Recorder(), list(inspect.signature(module._launch.kernel.fn).parameters)
    monkeypatch.setattr(module, "_launch", Launcher(recorder))
    call()
    call()
    assert len(recorder.analysed) == 1 and len(recorder.direct) == 1
    args, named = recorder.analysed[0]
    bound = dict(zip(names, args, strict=False)) | {name: named[name] for name in named if name in names}
    assert set(bound) == set(names) and set(named) - set(names) == {"num_warps", "num_stages", "maxnreg"}
    direct = dict(zip(names, recorder.direct[0], strict=True))
    for name, value in bound.items():
        if not isinstance(value, torch.Tensor):
            assert direct[name] == value, name
        else:
            assert direct[name].shape == value.shape and direct[name].dtype == value.dtype, name


def test_a_binary_is_found_by_all_that_it_depends_on() -> None:
    recorder, x, y = Recorder(), torch.zeros(8), torch.zeros(8, dtype=torch.float16)
    assert x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    go = Launcher(recorder)
    cases: list[tuple[Any, ...]] = [
        ((x, None), (1, 2), {"A": 1}, {"num_warps": 4}),
        ((y, None), (1, 2), {"A": 1}, {"num_warps": 4}),
        ((x, x), (1, 2), {"A": 1}, {"num_warps": 4}),
        ((x, None), (1, 16), {"A": 1}, {"num_warps": 4}),
        ((x, None), (1, 2), {"A": 2}, {"num_warps": 4}),
        ((x, None), (1, 2), {"A": 1}, {"num_warps": 8}),
    ]
    for tensors, integers, constants, options in cases * 2:
        go(3, tensors, integers, (0.5,), constants, options)
    assert len(recorder.analysed) == len(recorder.direct) == len(cases)


def test_unaligned_pointers_are_left_to_triton() -> None:
    recorder, x = Recorder(), torch.zeros(8)
    go = Launcher(recorder)
    for tensor in (x, x[1:], x[1:], x):
        go(1, (tensor,), (1,), (), {}, {})
    assert len(recorder.analysed) == 3 and len(recorder.direct) == 1


def test_what_is_remembered_is_bounded() -> None:
    go = Launcher(Recorder())
    go.limit = 5
    for size in range(20):
        go(1, (torch.zeros(4),), (size,), (), {}, {})
    assert len(go.known) <= 5


def test_no_overlap_where_waiting_weights_would_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults with 4 warps instead of 8: the tuner drops them, a caller may not know."""
    assert overlaps(True, 128, 64, 128, 8, 0, CPU)
    assert not overlaps(True, 128, 64, 128, 4, 0, CPU)
    assert not overlaps(True, 128, 128, 128, 8, 128, CPU)
    assert not overlaps(False, 64, 32, 64, 4, 0, CPU)
    monkeypatch.setattr(launch, "_capability", lambda device: 8)
    assert not overlaps(True, 128, 64, 128, 8, 0, CPU), "products wait for themselves before Hopper"


def test_register_caps_are_for_products_from_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (register_cap(128, CPU), register_cap(0, CPU), register_cap(64)) == (128, None, 64)
    monkeypatch.setattr(launch, "_capability", lambda device: 12)
    assert register_cap(128, CPU) is None
