"""Wrong input is refused before anything runs, with a message that names the argument."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import chipmunk_kernels as ck
from chipmunk_kernels import checks
from chipmunk_kernels.backends.torch.attention import DenseSettings, SparseSettings
from tests.factories import attention_inputs, mlp_inputs, scattered_columns

q, k, v = attention_inputs(1, 2, 100, 130)
columns = scattered_columns(1, 2, 100, 130)
lse = torch.zeros(1, 2, 100)
scores = torch.rand(1, 2, 2, 130)
m = mlp_inputs(1, 100, 64, 130)


def mlp(**changed: Any) -> Any:
    named = {**vars(m), **changed}
    return ck.sparse_mlp(
        *(named[n] for n in ("x", "w1", "b1", "w2_by_neuron", "columns", "activation_cache", "output_cache")),
        activation=changed.get("activation", "gelu_tanh"),
    )


def topk(**changed: Any) -> Any:
    return ck.topk_columns(
        changed.pop("scores", scores), changed.pop("k", 5), **{"group_size": 64, **changed}
    )


CASES: list[tuple[str, Callable[[], Any]]] = [
    (r"q: expected shape \(B, H, N, D\), got \(2, 100, 64\)", lambda: ck.dense_attention(q[0], k, v)),
    (
        r"q: expected float16, bfloat16 or float32, got torch.float64",
        lambda: ck.dense_attention(q.double(), k, v),
    ),
    (r"q: expected at least one element", lambda: ck.dense_attention(q[:, :, :0], k, v)),
    (
        r"k: expected shape \(1, 2, 130, 64\), got \(1, 1, 130, 64\)",
        lambda: ck.dense_attention(q, k[:, :1], v),
    ),
    (r"k: expected torch.float32, got torch.float16", lambda: ck.dense_attention(q, k.half(), v)),
    (r"v: expected shape", lambda: ck.dense_attention(q, k, v[:, :, :-1])),
    (r"v: expected on cpu .* got meta", lambda: ck.dense_attention(q, k, v.to("meta"))),
    (r"k: expected a contiguous last dimension", lambda: ck.dense_attention(q, k.mT.contiguous().mT, v)),
    (r"key_length: expected 0 to 130.*got 131", lambda: ck.dense_attention(q, k, v, key_length=131)),
    (r"key_length: expected 0 to 130.*got -1", lambda: ck.dense_attention(q, k, v, key_length=-1)),
    (
        r"key_length: .*torch.int32, got torch.int64",
        lambda: ck.dense_attention(q, k, v, key_length=torch.ones(1).long()),
    ),
    (r"lse_prev: expected shape \(1, 2, 100\)", lambda: ck.colsum_attention(q, k, v, lse[:, :1], 64)),
    (r"lse_prev: expected torch.float32", lambda: ck.colsum_attention(q, k, v, lse.half(), 64)),
    (r"group_size: expected a positive integer, got 0", lambda: ck.colsum_attention(q, k, v, lse, 0)),
    (
        r"columns: expected \(B, H, G\) = \(1, 2, 1\) for 30 rows",
        lambda: ck.sparse_attention(q[:, :, :30], k, v, columns),
    ),
    (r"columns: expected on meta", lambda: ck.sparse_attention(*(x.to("meta") for x in (q, k, v)), columns)),
    (r"base: expected shape", lambda: ck.sparse_attention(q, k, v, columns, base=k)),
    (r"base: expected torch.float32", lambda: ck.sparse_attention(q, k, v, columns, base=q.half())),
    (r"sign: expected 1 or -1, got 2", lambda: ck.sparse_attention(q, k, v, columns, sign=2)),
    (r"scores: expected shape \(B, H, G, N\)", lambda: topk(scores=scores[0])),
    (r"scores: expected float16", lambda: topk(scores=scores.long())),
    (r"k: expected 0 or more columns, got -1", lambda: topk(k=-1)),
    (r"keep: .*got \(5, 131\)", lambda: topk(keep=[(5, 131)])),
    (r"keep: .*got \(9, 3\)", lambda: topk(keep=[(9, 3)])),
    (r"window: expected 0 or more", lambda: topk(window=-1)),
    (r"random: expected 0 or more", lambda: topk(random=-1)),
    (r"key_length: expected 0 to 130", lambda: topk(key_length=131)),
    (r"group_size: expected a positive", lambda: topk(group_size=0)),
    (
        r"coverage: expected a share from 0 to 1, got 1.5",
        lambda: ck.coverage_columns(scores, 1.5, group_size=64),
    ),
    (
        r"max_columns: expected 0 or more",
        lambda: ck.coverage_columns(scores, 0.5, group_size=64, max_columns=-1),
    ),
    (r"mask: expected a non-empty bool", lambda: ck.columns_from_mask(scores, group_size=64)),
    (r"capacity: expected 0 or more", lambda: ck.columns_from_mask(scores > 0, group_size=64, capacity=-1)),
    (r"x: expected shape", lambda: ck.gather_columns(k[0], columns)),
    (
        r"columns: expected .* for 300 rows",
        lambda: ck.gather_columns(torch.zeros(1, 2, 9, 300), columns, per_group=True),
    ),
    (r"packed: expected shape", lambda: ck.scatter_columns(k, columns, torch.zeros(1, 2, 130, 100))),
    (r"w1: expected shape \(130, 64\)", lambda: mlp(w1=m.w1[:, :-1])),
    (r"b1: expected shape \(130,\)", lambda: mlp(b1=m.b1[:-1])),
    (
        r"w2_by_neuron: expected 130 rows.*weight.t\(\).contiguous\(\)",
        lambda: mlp(w2_by_neuron=m.w2_by_neuron[:64]),
    ),
    (
        r"w2_by_neuron: expected contiguous rows",
        lambda: mlp(w2_by_neuron=m.w2_by_neuron.t().contiguous().t()),
    ),
    (
        r"activation_cache: expected shape \(1, 130, 100\)",
        lambda: mlp(activation_cache=m.activation_cache.mT),
    ),
    (r"output_cache: expected shape", lambda: mlp(output_cache=m.output_cache[:, 1:])),
    (r"output_cache: expected torch.float32", lambda: mlp(output_cache=m.output_cache.half())),
    (r"activation: expected one of gelu_tanh; got 'relu'", lambda: mlp(activation="relu")),
    (r"columns: expected \(B, H, G\) = \(1, 1, 2\)", lambda: mlp(columns=columns)),
    (r"group_size: expected a positive", lambda: ck.group_mean(m.x, 0)),
    (r"mid: expected shape \(B, F, M\)", lambda: ck.bias_gelu(m.x[0], None)),
    (r"mid: expected a contiguous last dimension", lambda: ck.bias_gelu(m.x.mT, None)),
    (r"bias: expected shape \(130,\), got \(100,\)", lambda: ck.bias_gelu(m.activation_cache, m.b1[:100])),
    (r"bias: expected torch.float32", lambda: ck.bias_gelu(m.activation_cache, m.b1.half())),
    (
        r"backend: expected one of torch, triton, triton_hopper, cupy, cupy_hopper; got 'tortch'",
        lambda: ck.group_mean(m.x, 64, backend="tortch"),
    ),
    (r"settings: .*takes SparseSettings", lambda: ck.dense_attention(q, k, v, settings=SparseSettings())),
]


@pytest.mark.parametrize(("message", "call"), CASES, ids=[message[:40] for message, _ in CASES])
def test_wrong_input_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_alone_name_their_backend() -> None:
    found = ck.dense_attention(q, k, v, settings=DenseSettings(scratch_mib=2))
    assert torch.equal(found[0], ck.dense_attention(q, k, v, backend="torch")[0])


def spoiled(slot: int, value: int) -> ck.ColumnSet:
    indices = columns.indices.clone()
    indices[0, 1, 1, slot] = value  # a full group
    return ck.ColumnSet(indices, columns.counts, 64)


VALUES: list[tuple[str, Callable[[], Any]]] = [
    (r"indices: expected 0 to 129.*got -1", lambda: ck.sparse_attention(q, k, v, spoiled(0, -1))),
    (r"indices: expected 0 to 129.*130", lambda: ck.gather_columns(k, spoiled(5, 130))),
    (r"indices: kept columns must ascend", lambda: ck.sparse_attention(q, k, v, spoiled(5, 3))),
    (
        r"counts: expected 0 to the capacity",
        lambda: ck.sparse_attention(q, k, v, ck.ColumnSet(columns.indices, columns.counts + 1, 64)),
    ),
    (
        r"counts: expected 0 to the capacity",
        lambda: ck.sparse_attention(q, k, v, ck.ColumnSet(columns.indices, columns.counts - 1, 64)),
    ),
    (r"q: 1 values are NaN.*\(0, 1, 2, 3\)", lambda: ck.dense_attention(one_nan(q, (0, 1, 2, 3)), k, v)),
    (r"scores: 1 values are NaN", lambda: topk(scores=one_nan(scores, (0, 0, 1, 7)))),
    (r"scores: expected no negative values", lambda: ck.coverage_columns(scores - 0.5, 0.5, group_size=64)),
    (r"x: 1 values are NaN", lambda: mlp(x=one_nan(m.x, (0, 5, 5)))),
    (r"indices: expected 0 to 129", lambda: mlp(columns=mlp_spoiled())),
]


def one_nan(x: torch.Tensor, place: tuple[int, ...]) -> torch.Tensor:
    x = x.clone()
    x[place] = float("nan")
    return x


def mlp_spoiled() -> ck.ColumnSet:
    return ck.ColumnSet(m.columns.indices + 100, m.columns.counts, 64)


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize(
    ("message", "call"), VALUES, ids=[f"{i} {m[:30]}" for i, (m, _) in enumerate(VALUES)]
)
def test_debug_mode_checks_values_too(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("debug")
def test_debug_mode_lets_good_values_through() -> None:
    ck.sparse_attention(q, k, v, columns)
    topk(keep=[(0, 3)], random=3)
    mlp(activation_cache=m.activation_cache.clone(), output_cache=m.output_cache.clone())


def test_values_are_not_read_outside_debug_mode() -> None:
    assert ck.topk_columns(one_nan(scores, (0, 0, 0, 0)), 5, group_size=64).capacity == 5


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
@pytest.mark.usefixtures("debug")
def test_the_environment_switches_debug_mode(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIPMUNK_DEBUG", value)
    assert importlib.reload(checks).debug() is on
