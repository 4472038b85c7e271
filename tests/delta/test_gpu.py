"""The delta engine on a GPU: work beside the current stream gives what it gives in place, bit for bit, and so
does a captured graph of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.delta import attention
from chipmunk_kernels.delta.attention import AttentionDelta
from chipmunk_kernels.delta.mlp import MlpDelta, MlpWeights
from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Schedule
from chipmunk_kernels.delta.side import Side
from tests.factories import randn

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
STEPS = 5


def in_place_and_beside(run: object, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all steps, first without the side stream, then with it."""
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(Side, "enabled", enabled)
        results.append(run())  # type: ignore[operator]
        torch.cuda.synchronize()
    return results[0], results[1]


@pytest.mark.parametrize("heads_at_once", [1, 2, 6])
def test_selection_beside_the_next_heads(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads at a time: the memory of one selection's masses is wanted by the next sums at once."""
    rows, group_size = 3000, 192
    monkeypatch.setattr(attention, "MASS_BYTES", heads_at_once * 4 * -(-rows // group_size) * rows)
    policy = AttentionPolicy(
        keep=0.1, random=0.02, window=32, group_size=group_size, schedule=Schedule(first=1, every=3, also=())
    )
    steps = [
        [randn(1, 6, rows, 128, dtype=torch.bfloat16, device=GPU, seed=3 * s + i) for i in range(3)]
        for s in range(STEPS)
    ]

    def run() -> list[Tensor]:
        delta = AttentionDelta(policy)
        return [delta(q, k, v, step, keep=((0, 64),)) for step, (q, k, v) in enumerate(steps)]

    for ours, wanted in zip(*in_place_and_beside(run, monkeypatch), strict=True):
        assert torch.equal(ours, wanted)


def test_mlp_caches_beside_the_second_product(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = MlpPolicy(keep=0.2, random=0.05, group_size=128, schedule=Schedule(first=1, every=3, also=()))
    up, down = (
        randn(*shape, dtype=torch.bfloat16, device=GPU, seed=seed, scale=shape[1] ** -0.5)
        for seed, shape in enumerate(((4096, 1024), (1024, 4096)))
    )
    weights = MlpWeights(up, None, down, None, lambda: down.t().contiguous())
    steps = [randn(1, 2000, 1024, dtype=torch.bfloat16, device=GPU, seed=s) for s in range(STEPS)]

    def run() -> list[Tensor]:
        delta = MlpDelta(policy)
        return [delta(x, weights, step) for step, x in enumerate(steps)]

    for ours, wanted in zip(*in_place_and_beside(run, monkeypatch), strict=True):
        assert torch.equal(ours, wanted)


def test_full_and_sparse_steps_in_a_graph() -> None:
    """The side stream is forked into the capture and joined there; a replay computes with what it finds."""
    schedule = Schedule(first=1, every=3, also=())
    attention_policy = AttentionPolicy(keep=0.1, random=0.02, window=32, group_size=192, schedule=schedule)
    mlp_policy = MlpPolicy(keep=0.2, random=0.05, group_size=128, schedule=schedule)
    up, down = (
        randn(*shape, dtype=torch.bfloat16, device=GPU, seed=seed, scale=shape[1] ** -0.5)
        for seed, shape in enumerate(((1024, 256), (256, 1024)))
    )
    by_neuron = down.t().contiguous()
    weights = MlpWeights(up, None, down, None, lambda: by_neuron)

    def draw(seed: int) -> list[Tensor]:
        shapes = [(1, 2, 1000, 128)] * 3 + [(1, 1000, 256)]
        return [
            randn(*shape, dtype=torch.bfloat16, device=GPU, seed=4 * seed + i)
            for i, shape in enumerate(shapes)
        ]

    def run(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> list[Tensor]:
        attend, mlp = AttentionDelta(attention_policy), MlpDelta(mlp_policy)
        return [out for step in range(2) for out in (attend(q, k, v, step), mlp(x, weights, step))]

    inputs = draw(0)
    run(*inputs)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*inputs)
    for seed in (1, 2):
        fresh = draw(seed)
        for target, values in zip(inputs, fresh, strict=True):
            target.copy_(values)
        graph.replay()
        torch.cuda.synchronize()
        for ours, wanted in zip(captured, run(*fresh), strict=True):
            assert torch.equal(ours, wanted)
