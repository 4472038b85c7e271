"""Encoding of tensor maps, without a driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chipmunk_kernels.backends.cupy_hopper import tensor_maps

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
