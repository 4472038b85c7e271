"""Profiles: what is read, what is left out, what is looked up, and which rung of the ladder answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chipmunk_kernels import profiles
from chipmunk_kernels.delta.policy import Policy
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile, ProfileError

HERE = profiles.device_identity("cpu")
PROBLEM = Problem("sparse_attention", rows=4352, columns=4352, width=128, heads=24, density=0.165)


def entry(problem: Problem = PROBLEM, **changes: Any) -> Entry:
    values: dict[str, Any] = {"backend": "torch", "settings": {"scratch_mib": 8}, "density_crossover": 0.6}
    return Entry(problem, **{**values, **changes})


def document(**changes: Any) -> dict[str, Any]:
    profile = Profile(device=HERE, entries=(entry(),), policies={"mine": Policy("mine")})
    return {**profile.as_dict(), **changes}


def write(path: Path, content: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.fixture(autouse=True)
def empty_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile on any rung, until a test puts one there."""
    monkeypatch.delenv(profiles.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "packaged_folder", lambda: tmp_path / "packaged")
    profiles.forget()


def test_a_written_profile_reads_back_equal(tmp_path: Path) -> None:
    profile = profiles.load(write(tmp_path / "p.yaml", document()))
    assert profile.entries == (entry(),)
    assert profile.policies == {"mine": Policy("mine")}
    assert profile.device == HERE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kernels: [", "not valid YAML"),
        ("just text", "expected a mapping"),
        ({"kernels": []}, "schema"),
        (document(schema=profiles.SCHEMA + 1), "newer"),
        (document(kernels={"a": 1}), "kernels: expected a list"),
        (document(device="H200"), "device: expected a mapping"),
    ],
)
def test_an_unusable_file_says_why(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "p.yaml", content)
    with pytest.raises(ProfileError, match=message) as caught:
        profiles.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_an_error_when_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such profile"):
        profiles.find("cpu", tmp_path / "absent.yaml")


BROKEN_ENTRIES = [
    "nonsense",
    {**entry().as_dict(), "operation": "no_such_operation"},
    {**entry().as_dict(), "backend": "fortran"},
    {**entry().as_dict(), "problem": {"rows": 0, "columns": 1, "width": 1}},
    {**entry().as_dict(), "settings": [1, 2]},
    {**entry().as_dict(), "density_crossover": 7},
    {**entry().as_dict(), "other_backends": {"fortran": {}}},
    {**entry().as_dict(), "other_backends": {"torch": 3}},
]


@pytest.mark.parametrize("broken", BROKEN_ENTRIES)
def test_a_broken_entry_is_left_out_with_one_warning(
    tmp_path: Path, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.yaml", document(kernels=[broken, entry().as_dict(), broken]))
    with caplog.at_level(logging.WARNING):
        profile = profiles.load(path)
    assert profile.entries == (entry(),)
    assert len(caplog.records) == 1
    assert "kernels[0]" in caplog.text and "kernels[2]" in caplog.text


def test_a_broken_policy_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = {"good": Policy("good").as_dict(), "bad": {"no_such_field": 1}, "worse": 3}
    profile = profiles.load(write(tmp_path / "p.yaml", document(policies=broken)))
    assert set(profile.policies) == {"good"}
    assert "policies.bad" in caplog.text and "policies.worse" in caplog.text


def test_lookup_prefers_the_exact_problem_then_the_nearest() -> None:
    near = Problem("sparse_attention", rows=4480, columns=4480, width=128, heads=24, density=0.165)
    far = Problem("sparse_attention", rows=119056, columns=119056, width=128, heads=24, density=0.07)
    profile = Profile(entries=(entry(far), entry(near), entry(PROBLEM)))
    assert profile.lookup(PROBLEM) == entry(PROBLEM)
    assert Profile(entries=(entry(far), entry(near))).lookup(PROBLEM) == entry(near)


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"width": 64}, {"operation": "dense_attention"}])
def test_lookup_never_crosses_what_a_kernel_cannot(change: dict[str, Any]) -> None:
    other = Problem.from_mapping({**PROBLEM.as_dict(), **change})
    assert Profile(entries=(entry(),)).lookup(other) is None
    assert Profile.empty().lookup(PROBLEM) is None


def test_the_ladder_from_the_bottom_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiles.find("cpu").rung == "safe defaults"

    other = {**HERE, "name": "another processor"}
    write(tmp_path / "packaged" / "another-processor.yaml", document(device=other))
    profiles.forget()
    found = profiles.find("cpu")
    assert found.rung == "packaged, transferred from another processor" and found.transferred

    write(tmp_path / "packaged" / f"{profiles.slug(HERE['name'])}.yaml", document())
    profiles.forget()
    found = profiles.find("cpu")
    assert found.rung == "packaged, this device" and not found.transferred

    write(tmp_path / profiles.LOCAL_FILE, document())
    profiles.forget()
    assert profiles.find("cpu").rung == "working directory"

    named = write(tmp_path / "environment.yaml", document())
    monkeypatch.setenv(profiles.ENVIRONMENT_VARIABLE, str(named))
    assert profiles.find("cpu").rung.startswith("environment variable")

    explicit = write(tmp_path / "explicit.yaml", document())
    found = profiles.find("cpu", explicit)
    assert found.rung == "explicit path" and found.path == explicit


def test_another_architecture_is_not_transferred(tmp_path: Path) -> None:
    write(tmp_path / "packaged" / "z.yaml", document(device={**HERE, "name": "z", "arch": "riscv64"}))
    write(
        tmp_path / "packaged" / "gpu.yaml",
        document(device={"name": "g", "kind": "cuda", "arch": HERE["arch"]}),
    )
    assert profiles.find("cpu").rung == "safe defaults"


def test_a_broken_file_come_across_is_a_miss_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / profiles.LOCAL_FILE, "kernels: [")
    write(tmp_path / "packaged" / f"{profiles.slug(HERE['name'])}.yaml", document())
    with caplog.at_level(logging.WARNING):
        assert profiles.find("cpu").rung == "packaged, this device"
        assert profiles.find("cpu").rung == "packaged, this device"
    assert len(caplog.records) == 1


def test_a_named_profile_of_another_kind_lends_only_its_policies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = {"name": "NVIDIA H200", "kind": "cuda", "arch": "sm_90"}
    profile = profiles.find("cpu", write(tmp_path / "h200.yaml", document(device=gpu)))
    assert profile.entries == () and set(profile.policies) == {"mine"} and profile.transferred
    assert "NVIDIA H200" in caplog.text


def test_what_is_used_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / profiles.LOCAL_FILE, document())
    with caplog.at_level(logging.INFO, logger="chipmunk_kernels.profiles"):
        for _ in range(3):
            profiles.find(torch.device("cpu"))
    assert [record.message.count("working directory") for record in caplog.records] == [1]


def test_profiles_serve_as_cache_keys() -> None:
    assert len({Profile(entries=(entry(),)), Profile(entries=(entry(),))}) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H200", "nvidia-h200"), ("AMD EPYC (2 cores)", "amd-epyc-2-cores"), ("///", "unknown")],
)
def test_slug(name: str, expected: str) -> None:
    assert profiles.slug(name) == expected
