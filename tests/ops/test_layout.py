"""Memory for results: laid out as asked, new at each call, wherever it comes from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chipmunk_kernels.layout import empty_like_queries, maker, strides_like_queries
from tuner.verify import PoisonedMemory

CPU = torch.device("cpu")
SHAPE = (2, 3, 5, 8)
DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=pytest.mark.gpu),
    pytest.param("cuda:1", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("strides", [None, (120, 8, 24, 1)])
@pytest.mark.parametrize("name", DEVICES)
def test_a_maker_gives_what_torch_would(
    name: str, dtype: torch.dtype, strides: tuple[int, ...] | None
) -> None:
    device = torch.device(name)
    if device.index and device.index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    new = maker(SHAPE, dtype, device, strides)
    first, second = new(), new()
    expected = torch.empty_strided(SHAPE, strides or (120, 40, 8, 1), dtype=dtype, device=device)
    for made in (first, second):
        assert made.device == expected.device and made.dtype == dtype
        assert made.shape == expected.shape and made.stride() == expected.stride()
        assert not made.requires_grad and made.is_inference() == expected.is_inference()
    assert first.data_ptr() != second.data_ptr()
    first.fill_(1)
    second.fill_(2)
    assert torch.equal(first, torch.ones_like(first))


@pytest.mark.parametrize("name", DEVICES[:2])
def test_who_poisons_memory_finds_it_poisoned(name: str) -> None:
    """Kernels are verified on outputs full of NaN: what they never write must not look right by chance."""
    new = maker(SHAPE, torch.float32, torch.device(name))
    with PoisonedMemory():
        assert new().isnan().all()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert new().isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_made_in_inference_mode_is_as_torch_makes_it() -> None:
    new = maker(SHAPE, torch.float32, CPU)
    with torch.inference_mode():
        assert new().is_inference()
    assert not new().is_inference()


def test_a_torch_without_the_short_way_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dynamo", SimpleNamespace())
    made = maker(SHAPE, torch.float16, CPU, (120, 8, 24, 1))()
    assert (made.shape, made.stride(), made.dtype) == (SHAPE, (120, 8, 24, 1), torch.float16)


def test_results_lie_as_queries_do() -> None:
    q = torch.zeros(2, 5, 3, 16)[..., :8].transpose(1, 2)
    assert strides_like_queries(q.shape, q.stride()) == empty_like_queries(q).stride() == (120, 8, 24, 1)
