"""The gate: every operation passes when right, and nothing wrong in a way seen before gets through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from chipmunk_kernels import registry
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from tuner.problem import MUTATED, make_case, scattered_columns
from tuner.verify import Check, PoisonedMemory, Sampled, error_budget, verify

CPU = torch.device("cpu")
PROBLEMS = [
    Problem("dense_attention", rows=200, columns=300, width=64, heads=2, group_size=1, dtype="float32"),
    Problem("colsum_attention", rows=200, columns=300, width=64, heads=2, group_size=64),
    Problem("sparse_attention", rows=200, columns=300, width=64, heads=2, group_size=64, density=0.2),
    Problem("sparse_attention", rows=100, columns=90, width=64, batch=2, group_size=64, dtype="float32"),
    Problem("topk_columns", rows=256, columns=700, width=1, heads=2, dtype="float32", density=0.1),
    Problem("topk_columns", rows=64, columns=6, width=1, group_size=64, dtype="float32", density=0.5),
    Problem("gather_columns", rows=256, columns=300, width=64, heads=2, density=0.1),
    Problem("scatter_columns", rows=200, columns=300, width=64, group_size=64, density=0.1),
    Problem("sparse_mlp", rows=200, columns=256, width=64, group_size=64, density=0.3),
    Problem("group_mean", rows=200, columns=64, width=64, group_size=64),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.key)
def test_the_torch_backend_passes(problem: Problem) -> None:
    kernel = registry.kernel(problem.operation, "torch")
    for seed in (1, 2):
        check = verify(kernel, kernel.settings(), problem, CPU, seed)
        assert check.ok, check.explain()


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        (Problem("topk_columns", 640, 700, 1, heads=3, dtype="float32", density=0.1), {"random": 40}),
        (
            Problem("topk_columns", 640, 700, 1, batch=2, dtype="float32", density=0.1),
            {"always_kept": 30, "random": 9},
        ),
        (Problem("gather_columns", 200, 300, 64, heads=2, group_size=64, density=0.1), {"per_group": 1}),
    ],
)
def test_calls_that_shapes_do_not_describe_are_verified_too(
    problem: Problem, options: dict[str, int]
) -> None:
    kernel = registry.kernel(problem.operation, "torch")
    chosen = tuple(sorted(options.items()))
    case = make_case(problem, CPU, 0, options=chosen)
    if problem.operation == "topk_columns":
        assert (case.inputs["random"], case.inputs["k"]) == (options["random"], problem.kept_columns)
    for seed in (1, 2):
        check = verify(kernel, kernel.settings(), problem, CPU, seed, chosen)
        assert check.ok, check.explain()


def without_extras(run: Any, scores: Any, k: int, always: Any, random: int, *rest: Any) -> Any:
    return run(scores, k + random, always, 0, *rest)


def test_extras_that_are_not_drawn_are_noticed_at_full_size() -> None:
    kernel, _ = spoiled("topk_columns", without_extras)
    problem = Problem("topk_columns", 640, 700, 1, heads=3, dtype="float32", density=0.1)
    case = make_case(problem, CPU, 0, options=(("random", 40),))
    assert not Sampled(case, 0).check(kernel, kernel.settings()).ok
    right = registry.kernel("topk_columns", "torch")
    assert Sampled(case, 0).check(right, right.settings()).ok


def spoiled(operation: str, spoil: Callable[..., Any]) -> tuple[Kernel, Problem]:
    """The torch kernel of an operation with something done to what it takes or gives."""
    kernel = registry.kernel(operation, "torch")
    problem = next(p for p in PROBLEMS if p.operation == operation)
    return dataclasses.replace(kernel, run=lambda *args: spoil(kernel.run, *args)), problem


def drop_a_column(run: Any, q: Any, k: Any, v: Any, columns: ColumnSet, *rest: Any) -> Any:
    fewer = ColumnSet(columns.indices, (columns.counts - 1).clamp(min=0), columns.group_size)
    return run(q, k, v, fewer, *rest)


def ignore_the_base(run: Any, q: Any, k: Any, v: Any, columns: Any, base: Any, *rest: Any) -> Any:
    return run(q, k, v, columns, None, *rest)


def leave_a_row_unwritten(run: Any, *args: Any) -> Any:
    out, lse = run(*args)
    partial = torch.empty_like(out)
    partial[:, :, :-1] = out[:, :, :-1]
    return partial, lse


def wrong_lse(run: Any, *args: Any) -> Any:
    out, lse = run(*args)
    return out, lse * 1.02


def one_group_wrong(run: Any, *args: Any) -> Any:
    out, lse = run(*args)
    out[-1, -1, -1] += 0.1
    return out, lse


def swap_a_column(run: Any, *args: Any) -> Any:
    indices, counts = run(*args)
    indices[..., 0] = (indices[..., 0] + 1) % 5
    return indices, counts


def out_of_range(run: Any, *args: Any) -> Any:
    indices, counts = run(*args)
    indices[-1, -1, -1, -1] = 10**6
    return indices, counts


def never_update_the_cache(run: Any, *args: Any) -> Any:
    before = args[5].clone()
    run(*args)
    args[5].copy_(before)


def three_percent(run: Any, *args: Any) -> Any:
    return run(*args) * 1.03


def write_a_neighbour(run: Any, packed: Any, columns: Any, out: Any, *rest: Any) -> Any:
    run(packed, columns, out, *rest)
    out[..., -1, :] += 1


def wrong_shape(run: Any, *args: Any) -> Any:
    return run(*args)[..., :-1]


WRONG = [
    ("sparse_attention", drop_a_column),
    ("sparse_attention", ignore_the_base),
    ("sparse_attention", leave_a_row_unwritten),
    ("sparse_attention", wrong_lse),
    ("sparse_attention", one_group_wrong),
    ("dense_attention", leave_a_row_unwritten),
    ("topk_columns", swap_a_column),
    ("topk_columns", out_of_range),
    ("sparse_mlp", never_update_the_cache),
    ("gather_columns", three_percent),
    ("gather_columns", wrong_shape),
    ("scatter_columns", write_a_neighbour),
    ("group_mean", three_percent),
]


@pytest.mark.parametrize(("operation", "spoil"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_kernel_does_not_pass(operation: str, spoil: Callable[..., Any]) -> None:
    kernel, problem = spoiled(operation, spoil)
    try:
        check = verify(kernel, kernel.settings(), problem, CPU, 3)
    except (IndexError, RuntimeError) as error:
        assert "index" in str(error)  # an index out of range is noticed when it is used
        return
    assert not check.ok
    assert check.explain()


def test_uninitialised_memory_shows_while_it_is_asked_for() -> None:
    like = torch.zeros(100)
    with PoisonedMemory():
        for made in (torch.empty(100), torch.empty_like(like), like.new_empty(100)):
            assert made.isnan().all()
        assert (torch.empty(100, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        assert torch.empty(3, dtype=torch.bool).all()
        assert (torch.zeros(100) == 0).all()
    kept = torch.empty(100).fill_(1.0)
    assert not kept.isnan().any()


def test_a_check_names_both_numbers() -> None:
    assert (
        Check(2.0, 1.0, "small case, out").explain() == "small case, out: error 2.000e+00, budget 1.000e+00"
    )


@pytest.mark.parametrize("ragged", [False, True])
def test_scattered_columns_are_valid_and_scattered(ragged: bool) -> None:
    problem = Problem("sparse_attention", rows=1000, columns=777, width=64, heads=3, density=0.13)
    columns = scattered_columns(problem, CPU, torch.Generator().manual_seed(1), ragged=ragged)
    columns.validate(problem.rows, problem.columns)
    if ragged:
        assert int(columns.counts.min()) == 0 and int(columns.counts.max()) == problem.columns
    else:
        assert (columns.counts == problem.kept_columns).all()
        assert len(columns.indices.unique(dim=2).flatten(0, 1)) > 1
        gaps = columns.indices.diff(dim=-1)
        assert int(gaps.min()) >= 1 and int(gaps.max()) > 777 // 101 + 1


@pytest.mark.parametrize("operation", sorted(MUTATED))
def test_mutated_inputs_are_restored(operation: str) -> None:
    problem = next(p for p in PROBLEMS if p.operation == operation)
    kernel = registry.kernel(operation, "torch")
    case = make_case(problem, CPU, 0)
    before = {name: case.inputs[name].clone() for name in MUTATED[operation]}
    case.run(kernel, kernel.settings())
    assert any(not torch.equal(case.inputs[name], value) for name, value in before.items())
    case.reset()
    assert all(torch.equal(case.inputs[name], value) for name, value in before.items())


def test_the_same_seed_gives_the_same_inputs_and_another_one_others() -> None:
    first, again, other = (make_case(PROBLEMS[2], CPU, seed).inputs["q"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_float32_is_granted_sixteen_units_of_rounding_and_no_more() -> None:
    """PyTorch's attention on a CPU needs some; a hundredth of what bfloat16 is granted stays wrong."""
    truth = torch.ones(3, dtype=torch.float64)
    unit = torch.finfo(torch.float32).eps
    assert error_budget(truth.float(), truth, torch.float32) == pytest.approx(32 * unit)
    assert error_budget(truth.bfloat16(), truth, torch.bfloat16) == pytest.approx(2 * 2**-7)
    assert 32 * unit < 2**-7 / 100
