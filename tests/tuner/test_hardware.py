"""Which device a name means, and what is known of it."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels.problem import Problem
from tuner import hardware
from tuner.baselines import work_of
from tuner.hardware import Ceilings, HardwareError, detect, measure_ceilings, resolve_device

PRESENT = ["NVIDIA GH200 480GB", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(PRESENT))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: PRESENT[index])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("auto", "cuda:0"),
        ("cuda", "cuda:0"),
        ("cuda:2", "cuda:2"),
        ("1", "cuda:1"),
        ("h200", "cuda:1"),
        ("gh200", "cuda:0"),
        ("A100", "cuda:2"),
        ("4090", "cuda:3"),
        ("sxm4", "cuda:2"),
        ("cpu", "cpu"),
    ],
)
def test_a_name_finds_its_device(gpus: None, name: str, device: str) -> None:
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize("name", ["h100", "l40s", "cuda:4", "9"])
def test_a_device_that_is_not_here_says_what_is(gpus: None, name: str) -> None:
    with pytest.raises(HardwareError, match=r"NVIDIA H200.*--gpu auto"):
        resolve_device(name)


def test_an_unknown_name_suggests_the_nearest(gpus: None) -> None:
    with pytest.raises(HardwareError, match="did you mean 'h100'"):
        resolve_device("h10o")


def test_without_a_gpu_auto_is_the_cpu_and_h100_says_so(no_gpu: None) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(HardwareError, match=r"no CUDA device.*--gpu auto"):
        resolve_device("h100")


def test_this_cpu_is_described() -> None:
    found = detect(torch.device("cpu"))
    assert found.kind == "cpu" and found.units >= 1
    assert found.memory_gib > 0 and found.cache_bytes >= 1 << 18


def test_versions_are_plain_strings() -> None:
    assert all(type(value) is str for value in hardware.toolchain().values())


def test_ceilings_are_measured_for_what_is_asked() -> None:
    found = measure_ceilings(torch.device("cpu"), ["float32", "float32"])
    assert set(found.peak_tflops) == {"float32"}
    assert found.peak_tflops["float32"] > 0 and found.bandwidth_gbs > 0
    assert Ceilings(**found.as_dict()) == found


def test_work_counts_what_a_problem_cannot_do_without() -> None:
    dense = Problem("dense_attention", rows=1000, columns=1000, width=128, heads=2)
    sparse = Problem("sparse_attention", rows=1000, columns=1000, width=128, heads=2, density=0.1)
    assert work_of(dense).flops == 4 * 2 * 1000 * 1000 * 128
    assert work_of(sparse).flops == pytest.approx(0.1 * work_of(dense).flops)
    mlp = Problem("sparse_mlp", rows=256, columns=1000, width=64, density=0.5)
    assert work_of(mlp).flops == 4 * 256 * 500 * 64
    mean = Problem("group_mean", rows=256, columns=64, width=64)
    assert work_of(mean).bytes == 2 * (256 + 2) * 64
    # 790 TFLOP/s and 4.3 TB/s: what an H200 reaches.
    assert work_of(dense).ideal_ms(790.0, 4300.0) == pytest.approx(work_of(dense).flops / 790e9)
    assert work_of(mean).ideal_ms(790.0, 4300.0) == pytest.approx(work_of(mean).bytes / 4300e6)


@pytest.mark.parametrize(
    "operation",
    ["topk_columns", "gather_columns", "scatter_columns", "colsum_attention"],
)
def test_what_only_moves_memory_is_bound_by_it(operation: str) -> None:
    work = work_of(Problem(operation, rows=256, columns=1000, width=64, density=0.5))
    assert work.bytes > 0
    assert (work.flops == 0) == (operation != "colsum_attention")
