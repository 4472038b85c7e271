"""Encoding of tensor maps, without a driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chipmunk_kernels.backends.cupy_hopper import tensor_maps
from chipmunk_kernels.backends.cupy_hopper.tensor_maps import Layout, mappable, maps_of
from tests.cupy_hopper.emulate import host_map

NO_CONTEXT, INVALID_VALUE = 201, 1


def encode_with(answers: list[int], monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, int]:
    """The map, and how often a context was joined, where the driver gives these answers."""
    joined: list[bool] = []

    def driver(*given: Any) -> int:
        return answers.pop(0)

    monkeypatch.setattr(tensor_maps, "_driver", lambda: SimpleNamespace(cuTensorMapEncodeTiled=driver))
    monkeypatch.setattr(tensor_maps, "join_context", lambda: joined.append(True))
    found = tensor_maps._encode(256, torch.bfloat16, (64, 10, 1, 1), (128, 1280, 1280), 64)
    assert not answers
    return found, len(joined)


def test_a_thread_without_a_context_joins_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, joined = encode_with([NO_CONTEXT, 0], monkeypatch)
    assert len(found) == tensor_maps.MAP_BYTES
    assert joined == 1
    assert encode_with([0], monkeypatch)[1] == 0


@pytest.mark.parametrize("answers", [[INVALID_VALUE], [NO_CONTEXT, NO_CONTEXT]])
def test_other_refusals_are_errors(answers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=f"error {answers[-1]}"):
        encode_with(answers, monkeypatch)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses that maps have been encoded for."""
    addresses: list[int] = []

    def encode(address: int, *rest: Any) -> bytes:
        addresses.append(address)
        return host_map(address, *rest)

    monkeypatch.setattr(tensor_maps, "_encode", encode)
    tensor_maps._map.cache_clear()
    return addresses


def layout(rows: int = 10, strides: tuple[int, ...] = (1280, 1280, 64, 1)) -> Layout:
    return Layout(torch.bfloat16, (1, 2, 10, 64), strides, rows, 64)


def test_maps_follow_addresses_and_layouts(encoded: list[int]) -> None:
    maps, others = maps_of(layout(), layout(5)), maps_of(layout(5), layout())
    first = maps(256, 512)
    assert first is not None
    assert len(first) == 2 * tensor_maps.MAP_BYTES
    assert maps(512, 256) not in (first, None)
    assert maps(256, 512) == first
    assert encoded == [256, 512, 512, 256]
    assert others(512, 256) == first[tensor_maps.MAP_BYTES :] + first[: tensor_maps.MAP_BYTES]
    assert len(encoded) == 4, "each was known"


def test_what_nothing_reads_has_the_first_map(encoded: list[int]) -> None:
    found = maps_of(layout(), None, None)(256, 0, 3)
    assert found == host_map(256, torch.bfloat16, (64, 10, 2, 1), (128, 2560, 128), 64) * 3


def test_what_no_map_describes_is_copied_in_its_order(encoded: list[int]) -> None:
    assert maps_of(layout(), layout())(256, 258) is None
    assert maps_of(layout(strides=(1280, 0, 64, 1)))(256) is None
    wide = torch.randn(1, 10, 2, 72).to(torch.bfloat16).transpose(1, 2)
    whole, odd, expanded = wide[..., :64], wide[..., 1:65], wide[:, :1, :, :64].expand(1, 2, 10, 64)
    assert mappable(whole) is whole
    for x in (odd, expanded):
        copy = mappable(x)
        assert torch.equal(copy, x)
        assert mappable(copy) is copy
    assert mappable(odd).stride() == (1280, 64, 128, 1)
