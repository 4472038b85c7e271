"""The workloads that ship: all readable, of real shapes, in the terms in which dispatch looks problems up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chipmunk_kernels.delta.policies import names as policy_names
from tuner.workload import Bar, LabelledProblem, Workload, WorkloadError, load_workload, names

EXPECTED = [
    "flux-dev",
    "flux-dev-hires",
    "flux-shapes",
    "h200",
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
    calls = [(item.problem, item.options) for item in workload.problems]
    assert len(set(calls)) == len(calls)
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


def test_the_laptop_runs_in_the_processors_own_precision_but_for_fluxs_attention() -> None:
    for dtype in ("bfloat16", "float32"):
        found = {item.label: item.problem.dtype for item in load_workload("laptop", dtype).problems}
        assert found.pop("FLUX, 8 heads, 93 % sparse") == "bfloat16"
        assert found.pop("FLUX, 8 heads, 83.5 % sparse") == "bfloat16"
        assert found.pop("flux-shapes columns, 16.5 % kept") == "float32"
        assert set(found.values()) == {dtype}


SHAPE = "operation: sparse_attention, rows: 64, columns: 64, width: 64, density: 0.5"


def loaded(folder: Path, *problems: str, head: str = "") -> Workload:
    path = folder / "mine.yaml"
    path.write_text("\n".join([head, "problems:", *(f"  - {{{problem}}}" for problem in problems)]))
    return load_workload(str(path))


def test_bars_are_for_a_backend_or_for_the_best(tmp_path: Path) -> None:
    workload = loaded(
        tmp_path,
        f"label: a, {SHAPE}, bar: {{speedup: {{triton: 10.8, cupy_hopper: 13}}}}",
        f"label: b, {SHAPE}, bar: {{time_of_dense: 0.03, dense: a}}",
        f"label: c, {SHAPE}, bar: {{speedup: 4, also: [a, b]}}",
        SHAPE,
        head="limits: {extra_mib: 64, launch_us: 15}",
    )
    a, b, c, plain = workload.problems
    assert a.bars == (Bar("speedup", 10.8, "triton"), Bar("speedup", 13.0, "cupy_hopper"))
    assert b.bars == (Bar("time_of_dense", 0.03, None, "a"),) and plain.bars == ()
    assert c.bars == (Bar("speedup", 4.0, also=("a", "b")),)
    assert a.bars[0].met_by(10.8) and not a.bars[0].met_by(10.7)
    assert b.bars[0].met_by(0.03) and not b.bars[0].met_by(0.031)
    assert dict(workload.limits) == {"extra_mib": 64.0, "launch_us": 15.0}


def test_options_say_how_an_operation_is_called(tmp_path: Path) -> None:
    gather = SHAPE.replace("sparse_attention", "gather_columns")
    (item,) = loaded(tmp_path, f"{gather}, options: {{per_group: 1}}").problems
    assert dict(item.options) == {"per_group": 1}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("bar: {sped: 2}", "expected one of speedup"),
        ("bar: {speedup: {cuda: 2}}", "expected backends among"),
        ("bar: {speedup: 2, dense: nobody}", "no problem is labelled 'nobody'"),
        ("bar: {speedup: 2, also: [nobody]}", "no problem is labelled 'nobody'"),
        ("bar: {speedup: 2, also: nobody}", "expected a list of labels"),
        ("options: {per_group: 1}", "for sparse_attention"),
    ],
)
def test_a_bar_or_option_that_means_nothing_is_refused(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        loaded(tmp_path, f"{SHAPE}, {extra}")
    with pytest.raises(WorkloadError, match="limits: expected"):
        loaded(tmp_path, SHAPE, head="limits: {seconds: 3}")


def labelled(label: str) -> LabelledProblem:
    return next(item for item in load_workload("h200").problems if item.label == label)


def bars(label: str) -> set[tuple[str, float, str | None]]:
    return {(bar.measure, bar.value, bar.backend) for bar in labelled(label).bars}


def test_the_h200_must_reach_what_was_set() -> None:
    videos = [
        ("Hunyuan 118656", 93, 13.0, 10.8),
        ("Hunyuan 119056", 93, 13.0, 10.8),
        ("Wan 75600", 90, 9.0, 7.6),
    ]
    for name, percent, hopper, triton in videos:
        assert bars(f"{name}, {percent} % sparse") == {("speedup", hopper, "cupy_hopper")}
        assert bars(f"{name} by 128, {percent} % sparse") == {("speedup", triton, "triton_hopper")}
    for rows in (4352, 4480):
        assert bars(f"FLUX {rows}, 83.5 % sparse") == {("speedup", 4.0, None)}
        assert bars(f"FLUX {rows}, 93 % sparse") == {("speedup", 7.5, None)}
    assert bars("Hunyuan 118656, column mass") == {("time_of_dense", 1.22, None)}
    for kept, value in ((3584, 2.75), (2560, 3.7), (1280, 6.2)):
        assert bars(f"FLUX MLP, {kept} of 12288 kept") == {("speedup", value, None)}
        assert labelled(f"FLUX MLP, {kept} of 12288 kept").problem.kept_columns == kept
    assert bars("video MLP, 3584 of 12288 kept") == {("speedup", 3.0, None)}
    assert bars("Hunyuan selection, 5 % + 1 % random + text") == {("time_of_dense", 0.03, None)}


def test_other_group_sizes_are_of_the_same_shape() -> None:
    problems = load_workload("h200").problems
    pairs = [(item, labelled(label)) for item in problems for bar in item.bars for label in bar.also]
    named = [
        (labelled(item.label.replace(" by 128", "")), item) for item in problems if " by 128" in item.label
    ]
    assert len(pairs) == 6 and len(named) == 3
    for one, other in pairs + named:
        assert one.problem.group_size != other.problem.group_size
        assert replace(other.problem, group_size=one.problem.group_size) == one.problem


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
