"""The dense baselines compute what the operation stands in for, and are named."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels.problem import Problem
from reference.attention import dense_attention
from reference.gather import gather_columns
from reference.group_mean import group_mean
from tuner import baselines as module
from tuner.baselines import Baseline, baselines, survey, work_of
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


def test_a_gather_of_each_groups_own_rows_is_compared_with_torch_doing_the_same() -> None:
    problem = Problem("gather_columns", density=0.3, **FIELDS)
    case = make_case(problem, "cpu", 0, options=(("per_group", 1),))
    columns = case.inputs["columns"]
    assert case.inputs["x"].shape == (1, 1, 300, 200)
    (baseline,) = baselines(case)
    truth = gather_columns(case.inputs["x"], columns.indices, columns.counts, columns.group_size, True)
    assert torch.equal(baseline.call(), truth)
    moved = 2 * 4 * truth.numel() + 4 * columns.indices.numel()
    assert work_of(problem, case.options).bytes == moved


def refuse() -> None:
    raise RuntimeError("no kernel found\nand more")


@pytest.mark.parametrize("failing", [("first",), ("first", "second", "compiled")])
def test_a_baseline_that_cannot_run_is_named_and_passed_over(
    failing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where libraries and compilers refuse shapes; the plain call is what is left then."""

    def candidates(*names: str) -> list[Baseline]:
        return [Baseline(name, refuse if name in failing else lambda: None) for name in names]

    case = make_case(Problem("sparse_attention", density=0.3, **FIELDS), "cpu", 0)
    monkeypatch.setattr(type(case), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(module, "_libraries", lambda case: candidates("first", "second"))
    monkeypatch.setattr(module, "_compiled", lambda case: candidates("compiled"))
    found = survey(case, compiled=True)
    assert found.failed == dict.fromkeys(failing, "RuntimeError: no kernel found")
    names = [baseline.name for baseline in found.found]
    expected = [name for name in ("first", "second", "compiled") if name not in failing]
    assert names == (expected or ["F.scaled_dot_product_attention"])
    assert "compiled" not in {*survey(case).failed, *(baseline.name for baseline in survey(case).found)}


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["sparse_attention", "sparse_mlp"])
def test_compiled_baselines_compute_what_the_libraries_do(operation: str) -> None:
    problem = Problem(operation, rows=512, columns=512, width=64, dtype="bfloat16", group_size=64)
    found = survey(make_case(problem, "cuda", 0), compiled=True).found
    first = found[0].call()
    assert len(found) >= 2
    for other in found[1:]:
        torch.testing.assert_close(other.call(), first, rtol=2e-2, atol=2e-2)
