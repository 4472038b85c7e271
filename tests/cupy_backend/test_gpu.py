"""The CuPy gather on a GPU: against the torch backend, repeated, captured, on another stream."""

from __future__ import annotations

import pytest
import torch

from chipmunk_kernels import registry
from chipmunk_kernels.backends.cupy import gather
from chipmunk_kernels.backends.torch import gather as peer
from suites.benchmarks.bars.costs import launch_cost
from tests.factories import poisoned, randn, scattered_columns
from tests.triton_mlp.cases import on_side_stream, poisoned_memory, replay

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda:0")
SETTINGS = gather.GatherSettings()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _needs_cupy() -> None:
    pytest.importorskip("cupy")
    assert registry.unavailable("cupy", GPU) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 5])
def test_rows_of_a_table(width: int, dtype: torch.dtype) -> None:
    x = randn(2, 900, 3, width, dtype=dtype, device=GPU).transpose(1, 2)
    columns = scattered_columns(2, 3, 1000, 900, 128, device=GPU)
    with poisoned_memory():
        packed = gather.gather_columns(x, columns, False, SETTINGS)
    torch.testing.assert_close(
        packed, peer.gather_columns(x, columns, False, peer.GatherSettings()), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "group_size"), [(3840, 128), (3900, 128), (1001, 192), (193, 24)])
def test_each_group_takes_and_returns_its_own_rows(rows: int, group_size: int, dtype: torch.dtype) -> None:
    x = randn(2, 1, 700, rows, dtype=dtype, device=GPU)
    columns = scattered_columns(2, 1, rows, 700, group_size, device=GPU)
    with poisoned_memory():
        packed = gather.gather_columns(x, columns, True, SETTINGS)
    torch.testing.assert_close(
        packed, peer.gather_columns(x, columns, True, peer.GatherSettings()), rtol=0, atol=0
    )
    for accumulate in (False, True):
        out = randn(*x.shape, dtype=dtype, device=GPU, seed=5)
        expected = out.clone()
        peer.scatter_columns(packed, columns, expected, accumulate, peer.ScatterSettings())
        gather.scatter_columns(packed, columns, out, accumulate, SETTINGS)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [gather.GatherSettings(8, 64, 1), gather.GatherSettings(128, 256, 8)])
def test_any_settings(settings: gather.GatherSettings) -> None:
    x = randn(1, 2, 500, 128, dtype=torch.bfloat16, device=GPU)
    columns = scattered_columns(1, 2, 600, 500, 128, device=GPU)
    expected = gather.gather_columns(x, columns, False, SETTINGS)
    assert torch.equal(gather.gather_columns(x, columns, False, settings), expected)


def test_in_a_graph_and_on_another_stream() -> None:
    x = randn(1, 1, 500, 640, dtype=torch.bfloat16, device=GPU)
    columns = scattered_columns(1, 1, 640, 500, 128, uniform=True, device=GPU)
    packed = gather.gather_columns(x, columns, True, SETTINGS)
    expected = torch.zeros_like(x)
    gather.scatter_columns(packed, columns, expected, False, SETTINGS)
    out = torch.zeros_like(x)
    replay(lambda: gather.scatter_columns(packed, columns, out, False, SETTINGS))
    assert torch.equal(out, expected)

    late = poisoned(*packed.shape, dtype=torch.bfloat16, device=GPU)
    out = torch.zeros_like(x)

    def fill_then_scatter() -> None:
        late.copy_(packed)
        gather.scatter_columns(late, columns, out, False, SETTINGS)

    on_side_stream(fill_then_scatter)
    assert torch.equal(out, expected)


def test_a_launch_costs_little() -> None:
    """Host time of a call, kernel left running: of the order of a launch, not of a compilation."""
    x = randn(1, 1, 64, 64, dtype=torch.bfloat16, device=GPU)
    columns = scattered_columns(1, 1, 64, 64, 64, uniform=True, device=GPU)
    gather.gather_columns(x, columns, False, SETTINGS)
    cost = launch_cost(lambda: gather.gather_columns(x, columns, False, SETTINGS), x.device)
    assert cost.us < 100, cost


def test_the_second_gpu_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda:1")
    x = randn(1, 1, 64, 64, dtype=torch.bfloat16, device=other)
    columns = scattered_columns(1, 1, 64, 64, 64, device=other)
    assert torch.cuda.current_device() == 0
    packed = gather.gather_columns(x, columns, False, SETTINGS)
    assert torch.equal(packed, peer.gather_columns(x, columns, False, peer.GatherSettings()))
    assert torch.cuda.current_device() == 0
