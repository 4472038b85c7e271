"""Every operation on every backend: odd sizes, all counts, large logits, repeats, streams, graphs, compilers.

The same tests run on the torch backend on a CPU, which are the twins of the gpu-marked ones; what has no
meaning there (streams, graphs, devices) has a twin in `test_a_call_reads_its_inputs_anew`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chipmunk_kernels import registry
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.problem import OPERATIONS as TUNED
from chipmunk_kernels.problem import Problem
from tests.ops.robustness import ATTENTION, OPERATIONS, SELECTION, Inputs, Outputs, call, check, make
from tests.triton_mlp.cases import poisoned_memory
from tuner.problem import make_case
from tuner.verify import Sampled

PLACES = [pytest.param(("torch", "cpu"), id="torch-cpu")] + [
    pytest.param((backend, "cuda:0"), id=backend, marks=pytest.mark.gpu) for backend in registry.BACKENDS
]
ON_GPUS = PLACES[1:]
HALVES = (torch.bfloat16, torch.float16)
Place = tuple[str, str]

each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_attention = pytest.mark.parametrize("operation", ATTENTION)
everywhere = pytest.mark.parametrize("place", PLACES)
on_gpus = pytest.mark.parametrize("place", ON_GPUS)


def need(operation: str, place: Place, dtype: torch.dtype = torch.bfloat16, width: int = 128) -> None:
    """Skip, saying why, what the backend does not offer."""
    backend, device = place
    reason = registry.unavailable(backend, device)
    if reason is None:
        kernel = registry.kernels(backend).get(operation)
        reason = f"no {operation} kernel" if kernel is None else kernel.unsupported(dtype, width)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def same(first: Outputs, second: Outputs, operation: str) -> None:
    """Bit for bit; of a selection what is kept, since padding slots may hold anything valid."""
    if operation in SELECTION:
        sets = [ColumnSet(indices, counts, 1) for indices, counts in (first, second)]
        assert torch.equal(sets[0].counts, sets[1].counts)
        assert torch.equal(sets[0].indices.where(sets[0].kept(), 0), sets[1].indices.where(sets[1].kept(), 0))
        return
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@everywhere
@each_operation
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_any_size_and_any_count(operation: str, place: Place, width: int, dtype: torch.dtype) -> None:
    need(operation, place, dtype, width)
    backend, device = place
    for number, (rows, batch) in enumerate([(1, 3), (63, 1), (64, 2), (191, 1), (193, 3)]):
        i = make(
            operation,
            rows,
            width=width,
            batch=batch,
            group_size=(128, 192, 64)[number % 3],
            dtype=dtype,
            device=device,
            seed=number,
        )
        with poisoned_memory():
            got = call(operation, i, backend)
        check(operation, got, i)


def large(operation: str, rows: int) -> Problem:
    """A model's size in rows and columns, with few heads, or neurons."""
    shape = {"rows": rows, "columns": rows, "width": 128, "heads": 2, "group_size": 192, "density": 0.07}
    if operation == "topk_columns":  # rows: of three groups, since the reference sorts each in Python
        shape |= {"rows": 3 * 192, "width": 1, "dtype": "float32"}
    elif operation == "gather_columns":
        shape |= {"rows": 3 * 192}
    elif operation == "scatter_columns":
        shape |= {"columns": 300, "width": 192, "heads": 1}
    elif operation == "sparse_mlp":
        shape |= {"columns": 512, "width": 256, "heads": 1}
    elif operation == "group_mean":
        shape |= {"columns": 128, "heads": 1, "density": 1.0}
    elif operation == "dense_attention":
        shape |= {"group_size": 1, "density": 1.0}
    return Problem(operation, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "rows"),
    [pytest.param(("torch", "cpu"), 700, id="torch-cpu-700")]
    + [
        pytest.param((backend, "cuda:0"), rows, id=f"{backend}-{rows}", marks=pytest.mark.gpu)
        for backend in registry.BACKENDS
        for rows in (4352, 119056)
    ],
)
@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op in TUNED])
def test_a_models_size(operation: str, place: Place, rows: int) -> None:
    """Compared on sampled groups, the first and the ragged last among them; finite everywhere."""
    backend, device = place
    problem = large(operation, rows)
    need(operation, place, getattr(torch, problem.dtype), problem.width)
    kernel = registry.kernel(operation, backend)
    case = make_case(problem, device, seed=rows, ragged=True)
    found = Sampled(case, seed=rows).check(kernel, kernel.settings())
    assert found.ok, found.explain()


@everywhere
@each_attention
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_to_200_stay_finite(operation: str, place: Place, dtype: torch.dtype) -> None:
    need(operation, place, dtype)
    backend, device = place
    i = make(operation, 300, dtype=dtype, device=device, seed=3)
    logits = i["q"].float() @ i["k"].float().transpose(-1, -2)
    i["scale"] = 200.0 / float(logits.abs().max())
    i["lse_prev"] = (logits * i["scale"]).logsumexp(-1) + 0.25
    out, *others = got = call(operation, i, backend)
    assert bool(out.isfinite().all()) and not any(bool(x.isnan().any()) for x in others)
    check(operation, got, i)


@everywhere
@each_operation
def test_the_same_bits_every_time(operation: str, place: Place) -> None:
    need(operation, place)
    backend, device = place
    rows = 1000 if device == "cpu" else 4352
    i = make(operation, rows, dtype=torch.bfloat16, device=device)
    first = call(operation, i, backend)
    for _ in range(3):
        same(call(operation, i, backend), first, operation)


def refresh(i: Inputs, values: Inputs) -> None:
    """Other values in the same memory."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            i[name].copy_(value)
        elif isinstance(value, ColumnSet):
            i[name].indices.copy_(value.indices)
            i[name].counts.copy_(value.counts)


def pair(operation: str, device: str) -> tuple[Inputs, Inputs]:
    """Two sets of inputs of one shape."""
    first, second = (make(operation, 700, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 5))
    return first, second


@everywhere
@each_operation
def test_a_call_reads_its_inputs_anew(operation: str, place: Place) -> None:
    """Nothing is remembered by where a tensor lies: what a replayed graph does, done eagerly."""
    need(operation, place)
    backend, device = place
    i, other = pair(operation, device)
    call(operation, i, backend)
    refresh(i, other)
    same(call(operation, i, backend), call(operation, other, backend), operation)


@on_gpus
@each_operation
def test_a_side_stream_is_kept(operation: str, place: Place) -> None:
    """The inputs become valid late, on that stream: work on any other would have read the old ones."""
    need(operation, place)
    backend, device = place
    i, other = pair(operation, device)
    expected = call(operation, other, backend)
    call(operation, i, backend)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        refresh(i, other)
        got = call(operation, i, backend)
    stream.synchronize()
    same(got, expected, operation)


@on_gpus
@each_operation
def test_a_replayed_graph_gives_the_eager_bits(operation: str, place: Place) -> None:
    need(operation, place)
    backend, device = place
    i, other = pair(operation, device)
    call(operation, i, backend)  # compiles outside the capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(operation, i, backend)
    for values in (other, make(operation, 700, dtype=torch.bfloat16, device=device, seed=6)):
        refresh(i, values)
        for output in captured:
            output.fill_(float("nan") if output.is_floating_point() else -1)
        graph.replay()
        torch.cuda.synchronize(device)
        same(captured, call(operation, values, backend), operation)


def compiled(operation: str, backend: str, compiler: str) -> Callable[[Inputs], Any]:
    return torch.compile(lambda i: call(operation, i, backend), fullgraph=True, backend=compiler)


@everywhere
@each_operation
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(operation: str, place: Place, compiler: str) -> None:
    need(operation, place)
    backend, device = place
    i = make(operation, 193, dtype=torch.bfloat16, device=device)
    torch.compiler.reset()
    got = compiled(operation, backend, compiler)(i)
    same(tuple(got), call(operation, i, backend), operation)


@on_gpus
@each_operation
def test_the_second_gpu_while_the_first_is_current(operation: str, place: Place) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    need(operation, place)
    backend, _ = place
    here, there = (make(operation, 300, dtype=torch.bfloat16, device=f"cuda:{index}") for index in (0, 1))
    got = call(operation, there, backend)
    assert torch.cuda.current_device() == 0
    assert all(output.device == torch.device("cuda:1") for output in got)
    same(tuple(output.to("cuda:0") for output in got), call(operation, here, backend), operation)
