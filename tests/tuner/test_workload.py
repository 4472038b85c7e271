"""The workloads that ship: all readable, of real shapes, in the terms in which dispatch looks problems up."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk_kernels.delta.policies import names as policy_names
from tuner.workload import WorkloadError, load_workload, names

EXPECTED = [
    "flux-dev",
    "flux-dev-hires",
    "flux-shapes",
    "hunyuan-video",
    "laptop",
    "wan2.1-1.3b",
    "wan2.1-14b",
]


def test_the_workloads_of_the_method_are_there() -> None:
    assert names() == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_every_workload_is_usable(name: str) -> None:
    workload = load_workload(name)
    problems = [item.problem for item in workload.problems]
    assert workload.name == name and workload.description
    assert len(set(problems)) == len(problems)
    assert set(workload.policies) <= set(policy_names())
    for problem in problems:
        if problem.operation == "topk_columns":  # what dispatch makes of scores (B, H, G, N)
            assert (problem.width, problem.dtype) == (1, "float32")
            assert problem.rows % problem.group_size == 0
        if problem.operation == "dense_attention":
            assert problem.group_size == 1
        if problem.operation == "scatter_columns":
            assert problem.width == problem.group_size
        if problem.operation == "group_mean":
            assert problem.columns == problem.width


@pytest.mark.parametrize(
    ("name", "operation", "shape"),
    [
        ("flux-dev", "sparse_attention", (24, 4352, 4352, 128)),
        ("flux-dev-hires", "sparse_attention", (24, 12032, 12032, 128)),
        ("hunyuan-video", "sparse_attention", (24, 119056, 119056, 128)),
        ("wan2.1-14b", "sparse_attention", (40, 75600, 75600, 128)),
        ("flux-shapes", "sparse_attention", (2, 4160, 4160, 128)),
        ("flux-dev", "sparse_mlp", (1, 3840, 12288, 3072)),
        ("flux-shapes", "sparse_mlp", (1, 4160, 1024, 256)),
    ],
)
def test_shapes_are_those_of_the_models(name: str, operation: str, shape: tuple[int, ...]) -> None:
    found = {
        (item.problem.heads, item.problem.rows, item.problem.columns, item.problem.width)
        for item in load_workload(name).select([operation])
    }
    assert shape in found


def test_the_laptop_runs_in_the_processors_own_precision() -> None:
    for dtype in ("bfloat16", "float32"):
        attention = load_workload("laptop", dtype).select(["sparse_attention"])
        assert {item.problem.dtype for item in attention} == {dtype}


@pytest.mark.parametrize(
    ("name", "near"), [("lptop", "laptop"), ("flux_dev", "flux-dev"), ("wan2.1", "wan2.1-14b")]
)
def test_an_unknown_workload_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(WorkloadError, match=f"did you mean '{near}'"):
        load_workload(name)


def test_an_unknown_operation_suggests_the_nearest() -> None:
    with pytest.raises(WorkloadError, match="did you mean 'topk_columns'"):
        load_workload("laptop").select(["topk"])


def test_an_operation_that_a_workload_has_not_says_what_it_has() -> None:
    with pytest.raises(WorkloadError, match="it has colsum_attention"):
        load_workload("hunyuan-video").select(["sparse_mlp"])


@pytest.mark.parametrize(
    "text",
    [
        "problems: []",
        "problems: [",
        "- a",
        "problems: [{operation: sparse_mlp}]",
        "problems: [{rows: x}]",
        "3",
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=r"mine\.yaml"):
        load_workload(str(path))
