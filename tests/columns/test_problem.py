"""Problem and launch settings: identity, distance, and the values they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chipmunk_kernels.problem import OPERATIONS, Problem
from chipmunk_kernels.settings import LaunchSettings, choice

PROBLEM = Problem("sparse_attention", rows=4352, columns=4352, width=128, heads=24, density=0.165)


@dataclass(frozen=True)
class Tiles(LaunchSettings):
    tile: int = choice(64, 32, 64, 128)
    staged: bool = choice(True)


def problems() -> st.SearchStrategy[Problem]:
    sizes = st.integers(1, 10_000)
    return st.builds(
        Problem,
        operation=st.just("sparse_attention"),
        rows=sizes,
        columns=sizes,
        width=st.just(128),
        batch=st.integers(1, 4),
        heads=st.integers(1, 40),
        group_size=st.sampled_from([64, 128, 192]),
        density=st.floats(0.01, 1.0),
    )


@given(one=problems(), other=problems())
def test_distance_is_symmetric_and_zero_for_the_same(one: Problem, other: Problem) -> None:
    assert one.distance(one) == 0.0
    assert one.distance(other) == pytest.approx(other.distance(one))


@pytest.mark.parametrize("change", [{"operation": "dense_attention"}, {"dtype": "float16"}, {"width": 64}])
def test_what_needs_another_kernel_is_infinitely_far(change: dict[str, Any]) -> None:
    assert math.isinf(PROBLEM.distance(replace(PROBLEM, **change)))


def test_nearer_in_shape_is_nearer() -> None:
    near, far = replace(PROBLEM, rows=4480, columns=4480), replace(PROBLEM, rows=119056, columns=119056)
    assert 0 < PROBLEM.distance(near) < PROBLEM.distance(far)


@given(problem=problems())
def test_a_problem_survives_its_mapping(problem: Problem) -> None:
    assert Problem.from_mapping(problem.as_dict()) == problem
    assert 1 <= problem.kept_columns <= problem.columns


def test_the_key_tells_every_field() -> None:
    changed = (
        {"batch": 2}, {"heads": 1}, {"rows": 1}, {"columns": 1}, {"width": 64}, {"dtype": "float16"},
        {"group_size": 192}, {"density": 0.5}, {"operation": "gather_columns"},
    )  # fmt: skip
    keys = {PROBLEM.key, *(replace(PROBLEM, **change).key for change in changed)}
    assert len(keys) == 1 + len(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operation": "attention"}, "operation: expected one of"),
        ({"dtype": "float64"}, "dtype: expected one of"),
        ({"rows": 0}, "rows: expected a positive integer, got 0"),
        ({"heads": 2.0}, "heads: expected a positive integer"),
        ({"batch": True}, "batch: expected a positive integer"),
        ({"density": 0.0}, "density: expected a fraction"),
        ({"density": 1.5}, "density: expected a fraction"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PROBLEM, **change)


def test_a_mapping_with_wrong_fields_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['row'\]"):
        Problem.from_mapping({**PROBLEM.as_dict(), "row": 3})
    with pytest.raises(ValueError, match=r"missing fields \['width'\]"):
        Problem.from_mapping({"operation": OPERATIONS[0], "rows": 1, "columns": 1})


def test_settings_declare_their_space_and_survive_a_mapping() -> None:
    assert Tiles.space() == {"tile": (32, 64, 128), "staged": (True,)}
    assert Tiles().tile == 64
    assert Tiles.from_mapping(Tiles(tile=128).as_dict()) == Tiles(tile=128)
    assert len({Tiles(), Tiles(tile=64), Tiles(tile=32)}) == 2
    assert Tiles().as_json() == '{"staged": true, "tile": 64}'
    assert Tiles().misfit(PROBLEM) is None
    with pytest.raises(ValueError, match=r"Tiles: unknown settings \['tiles'\]"):
        Tiles.from_mapping({"tiles": 3})
