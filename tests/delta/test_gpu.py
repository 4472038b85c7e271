"""The delta engine on a GPU: work beside the current stream gives what it gives in place, bit for bit, and so
does a captured graph of it; an MLP's full step is right at real size, in no more memory than it caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.delta import attention
from chipmunk_kernels.delta.attention import AttentionDelta
from chipmunk_kernels.delta.mlp import MlpDelta, MlpWeights, by_neuron, by_token
from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Schedule
from chipmunk_kernels.delta.side import Side
from tests.factories import assert_within_budget, randn

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


def mlp_weights(dtype: torch.dtype) -> MlpWeights:
    """FLUX's, the second product's a part of a wider matrix."""
    up = randn(12288, 3072, dtype=dtype, device=GPU, seed=1, scale=3072**-0.5)
    down = randn(3072, 15360, dtype=dtype, device=GPU, seed=2, scale=12288**-0.5)[:, 3072:]
    up_bias, down_bias = (randn(n, dtype=dtype, device=GPU, seed=n) for n in (12288, 3072))
    return MlpWeights(up, up_bias, down, down_bias, lambda: down.t().contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "rows"), [(1, 3840), (1, 3901), (2, 1000)])
def test_activations_by_neuron(batch: int, rows: int, dtype: torch.dtype) -> None:
    """As right as by token, aligned, and the same bits every time."""
    weights = mlp_weights(dtype)
    x = randn(batch, rows, 3072, dtype=dtype, device=GPU)
    exact = MlpWeights(
        *(None if w is None else w.double() for w in (weights.up, weights.up_bias, weights.down)),  # type: ignore[arg-type]
        weights.down_bias.double(),  # type: ignore[union-attr]
        weights.by_neuron,
    )
    (activations, out), peer, truth = by_neuron(x, weights), by_token(x, weights), by_token(x.double(), exact)
    assert_within_budget(activations.mT, truth[0], peer[0], "activations")
    assert_within_budget(out, truth[1], peer[1], "output")
    assert activations.stride(2) == 1 and activations.stride(1) * activations.itemsize % 128 == 0
    for again, first in zip(by_neuron(x, weights), (activations, out), strict=True):
        assert torch.equal(again, first)


def test_a_full_step_takes_the_memory_of_its_caches() -> None:
    """The product becomes the activations, and the second product reads them as they lie."""
    policy = MlpPolicy(keep=0.2, random=0.05, group_size=128, schedule=Schedule(first=1, every=3, also=()))
    delta, weights = MlpDelta(policy), mlp_weights(torch.bfloat16)
    x = randn(2, 1920, 3072, dtype=torch.bfloat16, device=GPU)
    delta(x, weights, 0, share=True)  # the libraries' workspaces
    delta.reset()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    delta(x, weights, 0, share=True)
    held = torch.cuda.memory_allocated() - before
    assert held - delta.cache_bytes < 4 << 20  # blocks are rounded up
    # A library's workspace besides, but not the 94 MB of a copy.
    assert torch.cuda.max_memory_allocated() - before < held + (64 << 20)


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
