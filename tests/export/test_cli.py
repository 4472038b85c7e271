"""`chipmunk-export` from the command line: what it writes, says and refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from chipmunk_kernels.delta.policy import AttentionPolicy, Policy
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile
from tuner.export.cli import main

H200 = {"name": "NVIDIA H200", "kind": "cuda", "arch": "sm_90"}


def saved(path: Path, *policies: Policy, backend: str = "triton") -> str:
    """A profile of a GPU that this machine need not have, as a file."""
    entry = Entry(
        Problem("sparse_attention", 4352, 4352, 128, heads=24, density=0.165), backend, {"num_warps": 8}
    )
    profile = Profile(
        device=H200,
        toolchain={"triton": "3.6.0"},
        entries=(entry,),
        policies={policy.name: policy for policy in policies},
    )
    path.write_text(yaml.safe_dump(profile.as_dict()))
    return str(path)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    return saved(tmp_path / "nvidia-h200.yaml", Policy("mine", AttentionPolicy(keep=0.2)))


def test_chipmunk_config(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to", "chipmunk", "--profile", profile, "--output", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "chipmunk-config.yml"
    assert yaml.safe_load(written.read_text())["attn"]["top_keys"] == 0.2
    out, err = capsys.readouterr()
    assert out == f"wrote {written}\n"
    assert "not expressed: attention.group_size: 128" in err
    assert "not expressed: kernels: 1 " in err


def test_chipmunk_config_under_a_chosen_name(profile: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "mine.yml"
    assert main(["--to", "chipmunk", "--profile", profile, "--output", str(target), "--steps", "28"]) == 0
    assert yaml.safe_load(target.read_text())["steps"] == 28


def test_vllm_of_another_machines_profile(profile: str, tmp_path: Path) -> None:
    assert main(["--to", "vllm", "--profile", profile, "--output", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").iterdir()
    assert written.name.startswith("op=sparse_attention,") and "device_name=NVIDIA_H200" in written.name
    assert json.loads(written.read_text())["4352"] == {"num_warps": 8}


def test_report_as_json(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to", "chipmunk", "--profile", profile, "--output", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [str(tmp_path / "chipmunk-config.yml")]
    assert report["profile"] == profile
    assert any(line.startswith("attention.keep_text") for line in report["not_expressed"])


def test_built_in_policy_without_any_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--to", "chipmunk", "--policy", "hunyuan-video"]) == 0
    written = yaml.safe_load((tmp_path / "chipmunk-config.yml").read_text())
    assert written["mlp"] == {"is_enabled": False}
    assert written["attn"]["pad_qkv_before_kernel"] is True  # the target's video path
    assert isinstance(written["attn"]["full_step_schedule"], (set, type(None)))


def test_a_profiles_policy_goes_before_the_built_in_one(tmp_path: Path) -> None:
    own = saved(tmp_path / "own.yaml", Policy("flux-dev", AttentionPolicy(keep=0.31)), Policy("other"))
    assert (
        main(["--to", "chipmunk", "--profile", own, "--policy", "flux-dev", "--output", str(tmp_path)]) == 0
    )
    assert yaml.safe_load((tmp_path / "chipmunk-config.yml").read_text())["attn"]["top_keys"] == 0.31


def test_listing_writes_nothing(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["--list", "--profile", profile]) == 0
    out = capsys.readouterr().out
    for expected in ("chipmunk", "vllm", "mine", "flux-dev", "sparse_attention b1 h24"):
        assert expected in out
    assert main(["--list", "--profile", profile, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "NVIDIA H200"
    assert sorted(tmp_path.iterdir()) == before


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_refusals_name_the_problem_and_the_remedy(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = saved(tmp_path / "two.yaml", Policy("a"), Policy("b"))
    assert "--policy is needed: one of a, b" in refused(["--to", "chipmunk", "--profile", two], capsys)

    absent = str(tmp_path / "absent.yaml")
    assert "no such profile" in refused(["--to", "vllm", "--profile", absent], capsys)

    torch_only = saved(tmp_path / "cpu.yaml", backend="torch")
    assert "tune on a GPU" in refused(["--to", "vllm", "--profile", torch_only], capsys)

    assert "steps: expected" in refused(["--to", "chipmunk", "--profile", profile, "--steps", "0"], capsys)

    unknown = ["--to", "chipmunk", "--profile", profile, "--policy", "no-such-plan"]
    assert "no-such-plan" in refused(unknown, capsys)

    occupied = ["--to", "vllm", "--profile", profile, "--output", profile]
    assert "is a file; expected a folder" in refused(occupied, capsys)


def test_without_a_target_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "--to is needed: chipmunk or vllm" in capsys.readouterr().err


def test_a_failed_write_keeps_the_old_file(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "chipmunk-config.yml"
    target.write_text("old: true\n")
    before = sorted(tmp_path.iterdir())

    def full(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = refused(["--to", "chipmunk", "--profile", profile, "--output", str(tmp_path)], capsys)
    assert "No space left" in message and "--output" in message
    assert target.read_text() == "old: true\n"
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_is_refused(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    below = ["--to", "chipmunk", "--profile", profile, "--output", str(tmp_path / "file" / "below")]
    assert "cannot be written" in refused(below, capsys)
    assert "choose another --output" in refused(below, capsys)
