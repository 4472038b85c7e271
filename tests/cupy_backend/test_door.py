"""The door: who may pass, what it is compiled for, where the binaries are kept, what a broken source says."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chipmunk_kernels import registry
from chipmunk_kernels.backends import cupy as backend
from chipmunk_kernels.backends.cupy import gather, module
from tests.cupy_backend import nvrtc

NEEDS_KNOWN = (75, 80, 86, 89, 90, 100, 120)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kernels"))
    module._cache_folder.cache_clear()
    yield tmp_path / "kernels"
    module._cache_folder.cache_clear()


def test_a_cpu_is_turned_away() -> None:
    reason = registry.unavailable("cupy", "cpu")
    assert reason is not None
    assert "NVIDIA GPU" in reason
    assert "backend='torch'" in reason


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [
        ("12.9", "`pip install 'chipmunk-kernels[cuda12]'`"),
        ("13.0", "`pip install 'chipmunk-kernels[cuda13]'`"),
        (None, "`pip install 'chipmunk-kernels[cuda12]'` or `pip install 'chipmunk-kernels[cuda13]'`"),
    ],
)
def test_a_missing_cupy_names_the_extra(
    cuda: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.unavailable.__wrapped__(torch.device("cuda:0")) == f"cupy is not installed; run {remedy}"


def test_an_old_gpu_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = backend.unavailable.__wrapped__(torch.device("cuda:0"))
    assert reason is not None
    assert "Tesla T4 has 7.5" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.unavailable.__wrapped__(torch.device("cuda:0")) is None


def test_the_kernels_behind_it_need_no_cupy_to_be_listed() -> None:
    listed = registry.kernels("cupy")
    moves = {"gather_columns", "scatter_columns"}
    assert set(listed) == moves | {"topk_columns", "sparse_attention", "sparse_mlp"}
    assert all(kernel.backend == "cupy" for kernel in listed.values())
    assert "int32" in str(listed["gather_columns"].unsupported(torch.int32, 128))
    assert listed["gather_columns"].unsupported(torch.bfloat16, 128) is None


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((12, 0), "sm_120a"),
        ((12, 1), "compute_120"),
        ((8, 7), "compute_86"),
    ],
)
def test_each_gpu_gets_its_own_architecture(capability: tuple[int, int], target: str) -> None:
    assert module.architecture(capability, NEEDS_KNOWN) == target


def test_a_gpu_older_than_the_compiler() -> None:
    with pytest.raises(RuntimeError, match="the device has 70"):
        module.architecture((7, 0), NEEDS_KNOWN)


def test_a_binary_is_compiled_once_and_found_again(fresh_cache: Path) -> None:
    source = gather.SOURCES[0]
    with nvrtc.installed_as_cupy():
        first = module._binary(source, "sm_80")
        written = first.stat().st_mtime_ns
        assert first.parent == fresh_cache
        assert first.read_bytes()[:4] == b"\x7fELF"
        assert module._binary(source, "sm_80") == first
        assert first.stat().st_mtime_ns == written
        assert module._binary(source, "sm_90a") != first
        assert module._binary(gather.SOURCES[1], "sm_80") != first
    assert len(list(fresh_cache.iterdir())) == 3, "no temporary file stays behind"


def test_a_changed_source_is_another_binary(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gather.SOURCES[0]
    with nvrtc.installed_as_cupy():
        first = module._binary(source, "sm_80")
        changed = source.code() + "\n// changed\n"
        monkeypatch.setattr(module.Source, "code", lambda self: changed)
        assert module._binary(source, "sm_80") != first


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_folder(fresh_cache: Path) -> None:
    fresh_cache.mkdir(mode=0o555)
    assert module._cache_folder() != fresh_cache


def test_a_cache_path_that_is_a_file(fresh_cache: Path) -> None:
    fresh_cache.write_text("not a folder")
    with nvrtc.installed_as_cupy():
        assert module._binary(gather.SOURCES[0], "sm_80").is_file()


def test_a_broken_source_shows_the_compiler_s_words(fresh_cache: Path) -> None:
    source = gather.SOURCES[0]
    odd_width = tuple((name, 3 if name == "WIDTH" else value) for name, value in source.defines)
    broken = dataclasses.replace(source, defines=odd_width)
    with nvrtc.installed_as_cupy(), pytest.raises(RuntimeError, match="whole number of vectors") as error:
        module._binary(broken, "sm_90a")
    assert "gather.cu" in str(error.value)
    assert "-DWIDTH=3" in str(error.value)
    assert not list(fresh_cache.iterdir())
