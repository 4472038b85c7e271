"""The report: achieved density weighs selections by their use, and everything is plain data."""

from __future__ import annotations

import json

import pytest

from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.delta.report import Usage, density, summarise


def usage(lists: list[list[int]], width: int, uses: int) -> Usage:
    made = Usage()
    made.select(ColumnSet.from_lists([[lists]], 4), width).uses = uses
    return made


def test_density_counts_kept_columns_not_slots() -> None:
    ragged = usage([[0, 1, 2, 3], [5]], width=10, uses=3)
    assert density([ragged]) == pytest.approx(5 / 20)


def test_density_weighs_by_use() -> None:
    often, once, never = usage([[0]], 10, 9), usage([[0, 1, 2, 3, 4]], 10, 1), usage([list(range(10))], 10, 0)
    assert density([often, once, never]) == pytest.approx((9 * 1 + 5) / 100)
    assert density([never]) is None


def test_summary() -> None:
    attention, mlp, idle = usage([[0]], 4, 2), usage([[0, 1]], 4, 1), Usage()
    attention.full, attention.sparse, attention.dense["mask"] = 1, 2, 3
    mlp.full, mlp.sparse, mlp.dense["mask"] = 2, 1, 1
    idle.dense["offloaded"] = 4
    rows = [("a", "attention", attention), ("m", "mlp", mlp), ("i", "mlp", idle)]
    report = summarise(["full", "sparse"], rows, 123, ["noted"])  # type: ignore[arg-type]
    assert report.attention_density == pytest.approx(0.25) and report.mlp_density == pytest.approx(0.5)
    assert (report.full_calls, report.sparse_calls) == (3, 3)
    assert report.dense_calls == {"mask": 4, "offloaded": 4}
    assert [(layer.name, layer.dense_calls, layer.density) for layer in report.layers] == [
        ("a", 3, 0.25),
        ("m", 1, 0.5),
        ("i", 4, None),
    ]
    assert report.notes[0] == "noted" and "2 steps" in report.notes[1]
    assert json.loads(json.dumps(report.as_dict()))["cache_bytes"] == 123


def test_no_note_from_ten_steps_on() -> None:
    assert summarise(["full"] * 10, [], 0, []).notes == []
    assert summarise([], [], 0, []).notes == []
