"""`chipmunk-run flux` from beginning to end, on pipelines of a few layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
SPARSE = {
    "name": "test",
    "attention": {
        "keep": 0.2,
        "random": 0.01,
        "schedule": {"first": 2, "every": 4},
        "group_size": 64,
        "dense_layers": 0,
    },
    "mlp": {"keep": 0.3, "random": 0.05, "schedule": {"first": 1, "every": 4}, "group_size": 64},
    "patch": [[8, 8]],
}


def write_policy(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**SPARSE, **changes}))
    return path


@pytest.fixture
def folder_arguments(flux_folder: Path, tmp_path: Path) -> list[object]:
    policy = write_policy(tmp_path / "policy.yaml")
    return [
        "flux",
        "--model",
        flux_folder,
        "--policy",
        policy,
        "--size",
        128,
        "--steps",
        6,
        "--dtype",
        "float32",
    ]


def test_a_pipeline_folder_runs_both_ways(
    chipmunk_run: Run, folder_arguments: list[object], tmp_path: Path
) -> None:
    """Everything that a run promises: tables, record, pictures; and the record agrees with the pictures."""
    out_folder = tmp_path / "out"
    code, out, err = chipmunk_run(*folder_arguments, "--prompts", 2, "--output", out_folder)
    assert code == 0, err
    for word in ("dense ms", "speedup", "PSNR dB", "ceiling", "caches", "attention", "MLP", "profile"):
        assert word in out
    record = json.loads((out_folder / "record.json").read_text())
    assert record["settings"]["policy"]["attention"]["keep"] == 0.2
    assert {"machine", "versions", "profile", "order", "summary", "dense_baseline"} <= set(record)
    assert len(record["prompts"]) == 2
    for row in record["prompts"]:
        # "sparse if any layer ran sparse": the MLP's steps 1 to 3 and 5, attention's 2, 3 and 5.
        assert row["sparse"]["steps"] == ["full", "sparse", "sparse", "sparse", "full", "sparse"]
        assert len(row["dense"]["step_ms"]) == len(row["sparse"]["step_ms"]) == 6
        for side in ("dense", "sparse"):
            assert 0 < sum(row[side]["step_ms"]) <= row[side]["total_ms"]
        assert row["speedup"] == pytest.approx(row["dense"]["total_ms"] / row["sparse"]["total_ms"])
        assert 0.2 < row["attention_density"] < 0.6
        assert 0.3 <= row["mlp_density"] < 0.4
        assert row["cache_bytes"] > 0
        assert row["sparse_calls"] > 0
        assert row["full_calls"] > 0
        assert 1 < row["ceiling"]["policy"] < row["ceiling"]["limit"]
        assert not row["identical"], "with most columns left out the pictures must differ"
        names = row["pictures"]
        dense, sparse = (
            np.asarray(Image.open(out_folder / names[s]), dtype=float) for s in ("dense", "sparse")
        )
        assert dense.shape == (128, 128, 3)
        mse = np.mean((dense - sparse) ** 2)
        # The pictures are rounded to 8 bits, the recorded figure is not.
        assert 10 * np.log10(255**2 / mse) == pytest.approx(row["psnr_db"], abs=0.5)
        with Image.open(out_folder / names["side_by_side"]) as sheet:
            assert sheet.width > 3 * 128
    assert (out_folder / "all.png").is_file()


def test_everything_kept_equals_dense(chipmunk_run: Run, flux_folder: Path, tmp_path: Path) -> None:
    """100 % kept: sparse steps run, and give the dense picture to rounding."""
    whole = {"keep": 1.0, "random": 0.0, "schedule": {"first": 1, "every": 0}, "group_size": 64}
    policy = write_policy(tmp_path / "all.yaml", attention={**whole, "dense_layers": 0}, mlp=whole)
    arguments = ["flux", "--model", flux_folder, "--policy", policy, "--size", 128, "--steps", 4]
    code, out, err = chipmunk_run(
        *arguments, "--dtype", "float32", "--prompts", 1, "--output", tmp_path / "out", "--json"
    )
    assert code == 0, err
    row = json.loads(out)["prompts"][0]
    assert row["sparse"]["steps"] == ["full", "sparse", "sparse", "sparse"]
    assert row["attention_density"] == row["mlp_density"] == 1.0
    assert row["identical"] or row["psnr_db"] > 80


def test_a_run_resumes_and_refuses_other_settings(
    chipmunk_run: Run, folder_arguments: list[object], tmp_path: Path
) -> None:
    arguments = [*folder_arguments, "--output", tmp_path / "out"]
    assert chipmunk_run(*arguments, "--prompts", 1)[0] == 0
    first = json.loads((tmp_path / "out" / "record.json").read_text())["prompts"][0]
    code, _, err = chipmunk_run(*arguments, "--prompts", 2)
    assert code == 0
    assert "1 of 2 prompts are in" in err
    rows = json.loads((tmp_path / "out" / "record.json").read_text())["prompts"]
    assert rows[0] == first, "what was finished stays as it was measured"
    assert len(rows) == 2
    code, out, err = chipmunk_run(*arguments, "--prompts", 2)
    assert (code, "warming up" in err) == (0, False)
    assert rows[1]["prompt"] in out, "a finished run still prints its tables"
    code, _, err = chipmunk_run(*arguments, "--prompts", 2, "--seed", 7)
    assert code == 2
    assert "seed (there 0, now 7)" in err
    assert json.loads((tmp_path / "out" / "record.json").read_text())["prompts"] == rows
    code, _, _ = chipmunk_run(*arguments, "--prompts", 1, "--fresh", "--seed", 7)
    assert code == 0
    redone = json.loads((tmp_path / "out" / "record.json").read_text())["prompts"]
    assert [row["seed"] for row in redone] == [7]


def test_an_interrupt_keeps_what_is_finished(
    chipmunk_run: Run, folder_arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second prompt's sparse run: the first is recorded, and the same command goes on."""
    from suites.end_to_end import compare

    generate, calls = compare.generate, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(options)
        if len(calls) == 6:  # two warm-ups, the first prompt's two, the second's dense
            raise KeyboardInterrupt
        return generate(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "generate", interrupted)
    arguments = [*folder_arguments, "--prompts", 2, "--output", tmp_path / "out"]
    code, out, err = chipmunk_run(*arguments)
    assert code == 130
    assert "1 of 2 prompts are finished" in err
    assert "PSNR dB" in out
    assert len(json.loads((tmp_path / "out" / "record.json").read_text())["prompts"]) == 1
    monkeypatch.undo()
    code, _, err = chipmunk_run(*arguments)
    assert code == 0, err
    assert len(json.loads((tmp_path / "out" / "record.json").read_text())["prompts"]) == 2


def test_random_weights_compare_latents_and_say_so(chipmunk_run: Run, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.yaml")
    code, out, err = chipmunk_run(
        "flux",
        "--random-weights",
        "tiny",
        "--steps",
        5,
        "--policy",
        policy,
        "--output",
        tmp_path / "out",
        "--json",
    )
    assert code == 0, err
    record = json.loads(out)
    assert json.loads((tmp_path / "out" / "record.json").read_text()) == record
    row = record["prompts"][0]
    assert row["fidelity_of"] == "latents (random weights)"
    assert row["psnr_db"] > 0
    assert "sparsity will not pay" in err, "five steps are mostly full ones"


def test_stopping_the_dense_run_early_gives_step_times_only(chipmunk_run: Run, tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy.yaml")
    arguments = ["flux", "--random-weights", "tiny", "--steps", 5, "--policy", policy]
    code, out, err = chipmunk_run(*arguments, "--dense-steps", 2, "--output", tmp_path / "out")
    assert code == 0, err
    row = json.loads((tmp_path / "out" / "record.json").read_text())["prompts"][0]
    assert len(row["dense"]["step_ms"]) == 2
    assert len(row["sparse"]["step_ms"]) == 5
    assert row["speedup"] is None
    assert row["psnr_db"] is None
    assert row["step_speedup"] == pytest.approx(row["dense_step_ms"] / row["sparse_step_ms"])
    assert "predicted from these step times" in out
    assert not list((tmp_path / "out").glob("*.png"))
