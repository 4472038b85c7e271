"""The figures that a run's tables derive from its rows."""

from __future__ import annotations

from typing import Any

import pytest

from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule
from suites.end_to_end.compare import predicted_speedup
from suites.end_to_end.tables import fact_table, prompt_table, step_table, summary


def row(
    prompt: str, dense_ms: float, sparse_ms: float, psnr_db: float | None, **changes: Any
) -> dict[str, Any]:
    """A prompt's row: four steps, two of them full."""
    return {
        "prompt": prompt,
        "seed": 0,
        "dense": {"total_ms": dense_ms, "step_ms": [dense_ms / 4] * 4, "peak_bytes": None},
        "sparse": {
            "total_ms": sparse_ms,
            "step_ms": [sparse_ms / 4] * 4,
            "steps": ["full", "full", "sparse", "sparse"],
            "setup_ms": 1.0,
            "peak_bytes": None,
        },
        "dense_step_ms": dense_ms / 4,
        "full_step_ms": sparse_ms / 4,
        "sparse_step_ms": sparse_ms / 4,
        "step_speedup": dense_ms / sparse_ms,
        "speedup": dense_ms / sparse_ms,
        "psnr_db": psnr_db,
        "ssim": 0.9,
        "identical": psnr_db is None,
        "attention_density": 0.2,
        "mlp_density": None,
        "cache_bytes": 2**20,
        "dense_calls": {"one of the first 2 layers": 8},
        "notes": ["a note"],
        "ceiling": {"policy": 1.5, "limit": 3.0},
        "parts": {"attention_share": 0.5, "mlp_share": 0.25},
        **changes,
    }


ROWS = [row("first", 4000, 1000, 30.0), row("second", 1000, 1000, 34.0, ssim=0.8)]
RECORD = {
    "settings": {"model": "m", "dtype": "float32", "device": "cpu"},
    "dense_baseline": "the stock pipeline",
    "profile": "safe defaults",
}
POLICY = Policy(name="plan")


def test_a_summary_weighs_prompts_by_their_time_and_shows_the_worst() -> None:
    found = summary(ROWS)
    assert found["speedup"] == pytest.approx(5000 / 2000)
    assert found["speedup_lowest"] == 1
    assert (found["psnr_db_mean"], found["psnr_db_lowest"]) == (32, 30)
    assert (found["ssim_mean"], found["ssim_lowest"]) == (pytest.approx(0.85), 0.8)


def test_an_identical_picture_says_so_and_does_not_count_as_zero_db() -> None:
    rows = [ROWS[0], row("same", 1000, 500, None)]
    assert summary(rows)["psnr_db_lowest"] == 30
    assert "identical" in prompt_table(rows)


def test_every_prompt_is_in_the_table_and_the_sums_below() -> None:
    lines = prompt_table(ROWS).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["first", "second", "all"]
    assert lines[-1].split()[-3:] == ["2.50", "30.0", "0.800"]


def test_steps_show_medians_and_what_was_not_run() -> None:
    early = row("early", 4000, 1000, None)
    early["dense"]["step_ms"] = [7.0]
    lines = step_table([early]).splitlines()
    assert lines[2].split() == ["0", "full", "7.0", "250.0"]
    assert lines[3].split() == ["1", "full", "–", "250.0"]


def test_facts_say_what_stayed_dense_and_why() -> None:
    facts = fact_table(RECORD, ROWS, POLICY)
    for text in (
        "20.0% kept",
        "stayed dense",
        "8 calls: one of the first 2 layers",
        "1.50×",
        "3.00×",
        "a note",
    ):
        assert text in facts
    assert "unsteady" in facts, "1000 ms and 250 ms for the same dense step"
    assert "unsteady" not in fact_table(RECORD, ROWS[:1], POLICY)


def test_a_longer_schedule_is_predicted_from_the_steps_timed() -> None:
    """A step is full only if no part may be sparse in it, as the engine counts."""
    attention = AttentionPolicy(schedule=Schedule(first=2, every=10))
    plan = Policy(name="p", attention=attention, mlp=MlpPolicy(schedule=Schedule(first=1, every=10)))
    timed = {"dense_step_ms": 100.0, "full_step_ms": 110.0, "sparse_step_ms": 40.0}
    assert predicted_speedup(timed, plan, 50) == pytest.approx(5000 / (5 * 110 + 45 * 40))
    assert predicted_speedup({**timed, "sparse_step_ms": None}, plan, 50) is None
