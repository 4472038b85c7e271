"""One JSON per operation in vLLM's manner: names, keys, spelling, and what stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chipmunk_kernels.backends import triton
from chipmunk_kernels.delta.policy import Policy
from chipmunk_kernels.problem import OPERATIONS, Problem
from chipmunk_kernels.profiles import Entry, Profile
from tuner.export.result import ExportError
from tuner.export.vllm_moe import export, file_name, spelled

SETTINGS = {"block_m": 128, "block_n": 64, "peel_tail": True, "num_warps": 8, "num_stages": 3}
SPELLED = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 64, "PEEL_TAIL": True, "num_warps": 8, "num_stages": 3}


def attention(rows: int, columns: int | None = None, **fields: Any) -> Problem:
    return Problem("sparse_attention", rows, columns or rows, 128, heads=24, density=0.165, **fields)


def profile(*entries: Entry, **fields: Any) -> Profile:
    device = {"name": "NVIDIA H200", "kind": "cuda", "arch": "sm_90"}
    return Profile(device=device, toolchain={"triton": "3.6.0"}, entries=entries, **fields)


def test_rows_of_one_operation_share_a_file() -> None:
    result = export(
        profile(
            Entry(attention(12032), "triton", {**SETTINGS, "num_warps": 4}),
            Entry(attention(4352), "triton", SETTINGS),
        )
    )
    ((name, text),) = result.files.items()
    assert name == (
        "op=sparse_attention,B=1,H=24,D=128,G=128,density=0.165,device_name=NVIDIA_H200,dtype=bfloat16.json"
    )
    assert json.loads(text) == {
        "triton_version": "3.6.0",
        "4352": SPELLED,
        "12032": {**SPELLED, "num_warps": 4},
    }
    assert list(json.loads(text)) == ["triton_version", "4352", "12032"]
    assert result.warnings == ()


def test_the_text_itself() -> None:
    problem = Problem("group_mean", 256, 256, 64, dtype="float16")
    entry = Entry(problem, "triton", {"block_rows": 32, "num_warps": 4})
    assert export(profile(entry)).files == {
        "op=group_mean,B=1,H=1,C=256,D=64,G=128,density=1,device_name=NVIDIA_H200,dtype=float16.json": (
            "{\n"
            '    "triton_version": "3.6.0",\n'
            '    "256": {\n'
            '        "BLOCK_SIZE_ROWS": 32,\n'
            '        "num_warps": 4\n'
            "    }\n"
            "}\n"
        )
    }


def test_read_back_as_vllm_reads() -> None:
    """Drop the version, integer keys, nearest number of rows: the settings come back as they were tuned."""
    entries = [
        Entry(Problem(operation, rows, 512, 64, density=0.5), "triton", {**SETTINGS, "num_stages": rows % 5})
        for operation in OPERATIONS
        for rows in (128, 512, 4096)
    ]
    result = export(profile(*entries))
    names = {name: spelled(name) for name in SETTINGS}
    for entry in entries:
        table = json.loads(result.files[file_name(entry.problem, "NVIDIA H200")])
        table.pop("triton_version", None)
        by_rows = {int(key): settings for key, settings in table.items()}
        nearest = by_rows[min(by_rows, key=lambda rows: abs(rows - entry.problem.rows - 1))]
        assert {name: nearest[names[name]] for name in SETTINGS} == entry.settings


@pytest.mark.parametrize("operation", sorted(triton.kernels()))
def test_every_setting_of_our_kernels_keeps_a_name_of_its_own(operation: str) -> None:
    defaults = triton.kernels()[operation].settings().as_dict()
    assert len({spelled(name) for name in defaults}) == len(defaults)


def test_launch_options_have_tritons_names() -> None:
    settings = {
        "up_warps": 8,
        "down_stages": 3,
        "up_registers": 0,
        "max_registers": 128,
        "block": 64,
        "bits": 4,
    }
    (text,) = export(profile(Entry(attention(256), "triton", settings))).files.values()
    assert json.loads(text)["256"] == {
        "up_num_warps": 8,
        "down_num_stages": 3,
        "up_maxnreg": None,
        "maxnreg": 128,
        "BLOCK_SIZE": 64,
        "BITS": 4,
    }


def test_every_fixed_dimension_is_in_the_name() -> None:
    """Problems that differ in anything but their rows never share a file."""
    problems = [
        attention(4352),
        attention(4352, 4608),
        attention(4352, batch=2),
        attention(4352, dtype="float16"),
        attention(4352, group_size=192),
        Problem("sparse_attention", 4352, 4352, 64, heads=24, density=0.165),
        Problem("sparse_attention", 4352, 4352, 128, heads=12, density=0.165),
        Problem("sparse_attention", 4352, 4352, 128, heads=24, density=0.05),
        Problem("colsum_attention", 4352, 4352, 128, heads=24),
    ]
    assert len({file_name(problem, "NVIDIA H200") for problem in problems}) == len(problems)


def test_hidden_neurons_are_named_even_when_there_are_as_many_tokens() -> None:
    square = Problem("sparse_mlp", 12288, 12288, 3072, density=0.3)
    assert ",C=12288," in file_name(square, "NVIDIA H200")


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "Odd/Name, with comma", "back\\slash"])
def test_names_are_portable_file_names(device: str, tmp_path: Path) -> None:
    name = file_name(attention(4352), device)
    assert not set(name) & set('/\\ :*?"<>|')
    (tmp_path / name).write_text("{}")
    assert name.count(",") == file_name(attention(4352), "plain").count(",")


def test_what_stays_behind_is_named() -> None:
    other = Entry(attention(2048), "torch", {})
    crossing = Entry(
        attention(4352), "triton", SETTINGS, {"verdict": "dense is better"}, density_crossover=0.6
    )
    twice = Entry(attention(4352), "triton", {**SETTINGS, "num_warps": 4})
    result = export(profile(other, crossing, twice, policies={"flux-dev": Policy("flux-dev")}))
    (text,) = result.files.values()
    assert json.loads(text) == {"triton_version": "3.6.0", "4352": SPELLED}
    torch_won, verdict, crossover, listed_twice, policies = result.warnings
    assert "dense is better" in verdict
    assert "won by torch" in torch_won and other.problem.key in torch_won
    assert "density crossover 0.6" in crossover
    assert "listed twice" in listed_twice
    assert "flux-dev" in policies


def test_nothing_of_triton_is_an_error() -> None:
    with pytest.raises(ExportError, match="none of its 1 kernel entries"):
        export(profile(Entry(attention(256), "torch", {})))
    with pytest.raises(ExportError, match="names no device"):
        export(Profile.empty())
