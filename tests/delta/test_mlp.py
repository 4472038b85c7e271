"""The MLP delta against the equations written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from chipmunk_kernels.delta import mlp
from chipmunk_kernels.delta.mlp import MlpDelta, MlpWeights
from chipmunk_kernels.delta.policy import MlpPolicy, Schedule
from tests.delta import equations
from tests.factories import assert_within_budget, max_error, randn

WIDTH, NEURONS = 48, 160


def tokens(count: int, batch: int = 1, rows: int = 77, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    start = randn(batch, rows, WIDTH, seed=0)
    return [
        (start + 0.2 * step * randn(batch, rows, WIDTH, seed=1 + step)).to(dtype) for step in range(count)
    ]


def parameters(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        randn(NEURONS, WIDTH, seed=50, scale=WIDTH**-0.5).to(dtype),
        randn(NEURONS, seed=51, scale=0.1).to(dtype),
        randn(WIDTH, NEURONS, seed=52, scale=NEURONS**-0.5).to(dtype),
        randn(WIDTH, seed=53).to(dtype),
    )


def weights(dtype: torch.dtype = torch.float32) -> MlpWeights:
    w1, b1, w2, b2 = parameters(dtype)
    return MlpWeights(w1, b1, w2, b2, lambda: w2.t().contiguous())


def policy(keep: float, first: int = 1, every: int = 4, **more: object) -> MlpPolicy:
    values: dict[str, object] = {"random": 0.0, "group_size": 32, **more}
    return MlpPolicy(keep=keep, schedule=Schedule(first, every), **values)  # type: ignore[arg-type]


def kept_of(delta: MlpDelta) -> Tensor:
    assert delta.columns is not None
    return delta.columns.to_mask(NEURONS)[:, 0]


@pytest.fixture(params=[False, True], ids=["by-token", "by-neuron"])
def either_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full steps in the order of activations that a CPU takes, and in that of a GPU."""
    monkeypatch.setattr(mlp, "neuron_major", lambda device: request.param)


@pytest.mark.usefixtures("either_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "rows", "every_second"), [(1, 77, 1), (2, 96, 2), (3, 1, 1)])
def test_follows_the_equations(dtype: torch.dtype, batch: int, rows: int, every_second: int) -> None:
    xs = tokens(7, batch, rows, dtype)
    delta = MlpDelta(policy(0.3, random=0.05, reselect_every=every_second))
    truth = equations.Mlp(*(p.double() for p in parameters(dtype)), 32)
    peer = equations.Mlp(*parameters(dtype), 32)
    for step, x in enumerate(xs):
        out = delta(x, weights(dtype), step)
        if step % 4 == 0:
            exact, near = truth.full(x.double()), peer.full(x)
        else:
            kept = kept_of(delta)
            exact, near = truth.sparse(x.double(), kept), peer.sparse(x, kept)
        assert_within_budget(out, exact, near, f"step {step}")


def test_keeps_the_neurons_that_changed_most() -> None:
    """Change is measured against the means that the cached activations come from, step after step."""
    delta, truth = MlpDelta(policy(0.2, every=0)), equations.Mlp(*(p.double() for p in parameters()), 32)
    for step, x in enumerate(tokens(5)):
        change = truth.change(x.double()) if step else None
        delta(x, weights(), step)
        if change is None:
            truth.full(x.double())
            continue
        best = torch.zeros_like(change, dtype=torch.bool).scatter_(-1, change.topk(32).indices, True)
        assert torch.equal(kept_of(delta), best), f"step {step}"
        truth.sparse(x.double(), best)


@pytest.mark.usefixtures("either_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_kept_is_dense(dtype: torch.dtype) -> None:
    delta = MlpDelta(policy(1.0, every=0))
    truth, peer = (
        equations.Mlp(*(p.double() for p in parameters(dtype)), 32),
        equations.Mlp(*parameters(dtype), 32),
    )
    everything = torch.ones(1, 3, NEURONS, dtype=torch.bool)
    for step, x in enumerate(tokens(6, dtype=dtype)):
        near = peer.sparse(x, everything) if step else peer.full(x)
        assert_within_budget(delta(x, weights(dtype), step), truth.full(x.double()), near)


@pytest.mark.usefixtures("either_order")
def test_nothing_kept_repeats_the_full_step() -> None:
    delta = MlpDelta(policy(0.0, every=0))
    first, second = (delta(x, weights(), step) for step, x in enumerate(tokens(2)))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("either_order")
def test_no_biases() -> None:
    w1, _, w2, _ = parameters()
    bare = MlpWeights(w1, None, w2, None, lambda: w2.t().contiguous())
    delta = MlpDelta(policy(1.0, every=0))
    for step, x in enumerate(tokens(3)):
        dense = torch.nn.functional.gelu(x @ w1.t(), approximate="tanh") @ w2.t()
        assert max_error(delta(x, bare, step), dense) < 1e-5


@pytest.mark.parametrize(("batch", "rows"), [(1, 77), (2, 64), (2, 65)])
def test_activations_by_neuron_are_written_once(batch: int, rows: int) -> None:
    """Tokens that are a slice, weights that share a wider matrix: nothing as large as the cache is copied."""
    w1, b1, w2, b2 = parameters()
    x = torch.cat(tokens(2, batch, rows), dim=2)[..., :WIDTH]
    shared = torch.cat([w2, w2], dim=1)[:, NEURONS:]
    sliced = MlpWeights(w1, b1, shared, b2, lambda: shared.t().contiguous())
    mlp.by_neuron(x, sliced)
    with torch.profiler.profile(profile_memory=True) as profile:
        activations, out = mlp.by_neuron(x, sliced)
    made = [event.cpu_memory_usage for event in profile.events() if not event.cpu_children]
    assert sum(size >= activations.nbytes // batch for size in made) == 1
    assert activations.stride(2) == 1 and activations.stride(1) % mlp.LINE == 0
    by_token = mlp.by_token(x.contiguous(), weights())
    assert max_error(activations.mT, by_token[0]) < 1e-6 and max_error(out, by_token[1]) < 1e-5


def test_unchanged_tokens_show_no_change() -> None:
    """Both kinds of step take the means in the same way, so that rounding chooses no neurons."""
    delta = MlpDelta(policy(0.3, every=0))
    x = tokens(1, dtype=torch.bfloat16)[0]
    delta(x, weights(torch.bfloat16), 0)
    assert delta._means is not None
    before = delta._means.clone()
    delta(x, weights(torch.bfloat16), 1)
    assert torch.equal(delta._means, before)


def test_columns_are_reselected_when_the_policy_says() -> None:
    delta = MlpDelta(policy(0.2, every=0, reselect_every=2))
    chosen = []
    for step, x in enumerate(tokens(6)):
        delta(x, weights(), step)
        chosen.append(delta.columns)
    assert chosen[0] is None
    assert chosen[1] is chosen[2] and chosen[3] is chosen[4] and chosen[4] is not chosen[5]
    assert chosen[2] is not chosen[3]


def test_the_output_is_a_copy_unless_shared() -> None:
    kept, spoilt = MlpDelta(policy(0.3)), MlpDelta(policy(0.3))
    for step, x in enumerate(tokens(6)):
        expected = kept(x, weights(), step, share=True)
        assert expected is kept._out
        out = spoilt(x, weights(), step)
        assert torch.equal(out, expected)
        out.fill_(math.nan)


def test_a_step_before_another_full_one_caches_nothing() -> None:
    delta = MlpDelta(policy(0.3, first=2))
    x, later, _ = tokens(3)
    delta(x, weights(), 0)
    assert delta.cache_bytes == 0
    delta(later, weights(), 1)
    assert delta.cache_bytes == 4 * (NEURONS * 77 + WIDTH * 77 + NEURONS * 3)


def test_a_missed_refresh_and_another_shape_run_full() -> None:
    delta = MlpDelta(policy(0.3))
    xs = tokens(7)
    for step in (0, 1, 5, 6):
        delta(xs[step], weights(), step)
    assert (delta.usage.full, delta.usage.sparse) == (2, 2)
    delta(tokens(1, rows=40)[0], weights(), 7)
    assert delta.usage.full == 3


def test_transposed_weights_are_asked_for_on_sparse_steps_only() -> None:
    w1, b1, w2, b2 = parameters()
    asked = []

    def by_neuron() -> Tensor:
        asked.append(1)
        return w2.t().contiguous()

    delta = MlpDelta(policy(0.3))
    for step, x in enumerate(tokens(3)):
        delta(x, MlpWeights(w1, b1, w2, b2, by_neuron), step)
    assert len(asked) == 2
