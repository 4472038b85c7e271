"""Writing a profile: nothing that is there gets lost, and what cannot be written is said beforehand."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from chipmunk_kernels import profiles
from chipmunk_kernels.profiles import Entry
from tests.tuner.fakes import PROBLEM
from tuner import profile_writer
from tuner.profile_writer import OutputError, ProfileWriter, output_path

DEVICE = {"name": "NVIDIA H200", "kind": "cuda", "arch": "sm_90"}
EVIDENCE = {"verdict": "faster", "time": {"median_ms": 1.25, "low_ms": 1.2, "high_ms": 1.3}}
ENTRY = Entry(PROBLEM, "triton", {"block": 64}, EVIDENCE, 0.4)


def writer(path: Path) -> ProfileWriter:
    return ProfileWriter(path, DEVICE, {"torch": "2.11"})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "nvidia-h200.yaml"
    it = writer(path)
    it.add_policy("flux-dev", {"name": "flux-dev", "seed": 3})
    it.put(ENTRY)
    found = profiles.load(path)
    assert found.entries == (ENTRY,)
    assert found.device == DEVICE and found.toolchain == {"torch": "2.11"}
    assert found.policies["flux-dev"].seed == 3
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_other_entries_policies_and_unknown_parts_stay(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    other = dataclasses.replace(ENTRY, problem=dataclasses.replace(PROBLEM, rows=999))
    writer(path).put(other)
    document = yaml.safe_load(path.read_text())
    document["kernels"].append("a broken entry that somebody may want to mend")
    document["policies"] = {"mine": {"name": "mine", "seed": 9}}
    document["note"] = "ours"
    path.write_text(yaml.safe_dump(document))

    it = writer(path)
    it.add_policy("mine", {"name": "mine", "seed": 1})
    it.put(ENTRY)
    it.put(dataclasses.replace(ENTRY, settings={"block": 128}))
    after = yaml.safe_load(path.read_text())
    assert after["note"] == "ours" and after["policies"]["mine"]["seed"] == 9
    assert "a broken entry that somebody may want to mend" in after["kernels"]
    entries = {entry.problem: entry.settings for entry in profiles.load(path).entries}
    assert entries == {other.problem: {"block": 64}, PROBLEM: {"block": 128}}


def test_the_file_is_readable_by_people(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    writer(path).put(ENTRY)
    lines = path.read_text().splitlines()
    assert any("time: {median_ms: 1.25, low_ms: 1.2, high_ms: 1.3}" in line for line in lines)
    assert "schema: 1" in lines


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "p.yaml"
    it = writer(path)
    it.put(ENTRY)
    before = path.read_bytes()

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profile_writer.os, "fsync" if moment == "write" else "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        it.put(dataclasses.replace(ENTRY, settings={"block": 128}))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["p.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kernels: [", "left alone"),
        (yaml.safe_dump({"schema": 99}), "newer"),
        (yaml.safe_dump({"schema": 1, "device": {"name": "NVIDIA B200"}}), "tuned for NVIDIA B200"),
    ],
)
def test_a_file_that_must_not_be_overwritten_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(content)
    with pytest.raises(OutputError, match=message) as caught:
        writer(path)
    assert "--output" in str(caught.value) and path.read_text() == content


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(profile_writer.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="--output"):
        writer(tmp_path / "p.yaml")


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--output"):
        writer(tmp_path / "file" / "p.yaml")


def test_where_the_profile_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert output_path("a/b.yaml", "NVIDIA H200") == Path("a/b.yaml")
    assert output_path("a/b", "NVIDIA H200") == Path("a/b/nvidia-h200.yaml")
    assert output_path(None, "NVIDIA H200") == profiles.packaged_folder() / "nvidia-h200.yaml"
    monkeypatch.setattr(profiles, "in_checkout", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert output_path(None, "NVIDIA H200") == tmp_path / profiles.LOCAL_FILE


def test_a_profile_written_by_default_is_found_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = profiles.device_identity("cpu")
    monkeypatch.delenv(profiles.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "in_checkout", lambda: False)
    profiles.forget()
    profiles.find("cpu")
    ProfileWriter(output_path(None, here["name"]), here, {}).put(ENTRY)
    assert profiles.find("cpu").lookup(PROBLEM) == ENTRY


def test_the_written_file_is_for_everybody_to_read(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    writer(path).put(ENTRY)
    assert os.stat(path).st_mode & 0o777 == 0o644
