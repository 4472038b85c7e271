"""The dense baselines compute what the operation stands in for, and are named."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels.problem import Problem
from reference.attention import dense_attention
from reference.gather import gather_columns
from reference.group_mean import group_mean
from tuner.baselines import baselines
from tuner.problem import make_case

FIELDS = {"rows": 200, "columns": 300, "width": 64, "dtype": "float32", "group_size": 64}


@pytest.mark.parametrize("operation", ["dense_attention", "colsum_attention", "sparse_attention"])
def test_attention_is_compared_with_dense_attention(operation: str) -> None:
    case = make_case(Problem(operation, heads=2, **FIELDS), "cpu", 0)
    (baseline,) = baselines(case)
    truth, _ = dense_attention(case.inputs["q"], case.inputs["k"], case.inputs["v"])
    torch.testing.assert_close(baseline.call(), truth)
    assert baseline.name == "F.scaled_dot_product_attention"


def test_the_mlp_is_compared_with_the_dense_mlp() -> None:
    case = make_case(Problem("sparse_mlp", density=0.3, **FIELDS), "cpu", 0)
    (baseline,) = baselines(case)
    x, w1, b1, w2 = (case.inputs[name] for name in ("x", "w1", "b1", "w2_by_neuron"))
    hidden = torch.nn.functional.gelu(x @ w1.T + b1, approximate="tanh")
    torch.testing.assert_close(baseline.call(), hidden @ w2)


def test_moving_columns_is_compared_with_torch_doing_the_same() -> None:
    case = make_case(Problem("gather_columns", density=0.3, heads=2, **FIELDS), "cpu", 0)
    columns = case.inputs["columns"]
    (baseline,) = baselines(case)
    truth = gather_columns(case.inputs["x"], columns.indices, columns.counts, columns.group_size)
    assert torch.equal(baseline.call(), truth)

    case = make_case(Problem("scatter_columns", density=0.3, **FIELDS), "cpu", 0)
    (baseline,) = baselines(case)
    columns, packed = case.inputs["columns"], case.inputs["packed"]
    written = baseline.call()
    first = int(columns.indices[0, 0, 1, 0])
    assert torch.equal(written[0, 0, 1, first], packed[0, 0, 1, 0])


def test_topk_is_compared_with_a_sorted_topk() -> None:
    problem = Problem(
        "topk_columns", rows=128, columns=300, width=1, dtype="float32", group_size=64, density=0.1
    )
    case = make_case(problem, "cpu", 0)
    (baseline,) = baselines(case)
    assert baseline.call().values.shape == (1, 1, 2, problem.kept_columns)
    assert "torch.topk" in baseline.name


@pytest.mark.parametrize("rows", [200, 256, 40])
def test_the_group_mean_is_compared_with_a_mean(rows: int) -> None:
    case = make_case(Problem("group_mean", **{**FIELDS, "rows": rows}), "cpu", 0)
    (baseline,) = baselines(case)
    means = torch.cat([part.view(1, -1, 64) for part in baseline.call()], dim=1)
    torch.testing.assert_close(means, group_mean(case.inputs["x"], 64))
