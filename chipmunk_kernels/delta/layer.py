"""A layer of the model: one delta per guidance branch, and what the layer did in this generation.

`torch.compile` breaks its graph around a delta: the step number would be compiled in as a constant, and
every step compiled anew.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from chipmunk_kernels.delta.attention import AttentionDelta, Ranges, mix_seed
from chipmunk_kernels.delta.mlp import MlpDelta, MlpWeights
from chipmunk_kernels.delta.report import Kind, Usage

if TYPE_CHECKING:
    from chipmunk_kernels.delta.engine import Engine

Delta = TypeVar("Delta", AttentionDelta, MlpDelta)

OUTSIDE = "called outside the transformer's forward: no step is known"
AUTOGRAD = "autograd is on: call under torch.no_grad()"


class Layer(ABC, Generic[Delta]):
    """What attention and MLP layers have in common.

    Attributes:
        engine: tells the step and the guidance branch.
        name: the module's path in the model.
        kind: "attention" or "mlp".
        usage: counts of the current generation.
    """

    kind: Kind

    def __init__(self, engine: Engine, name: str, number: int, dense_layers: int) -> None:
        self.engine: Engine = engine
        self.name: str = name
        self.usage: Usage = Usage()
        self._seed = mix_seed(engine.policy.seed, ("attention", "mlp").index(self.kind), number)
        self._always_dense = f"one of the first {dense_layers} layers" if number < dense_layers else None
        self._deltas: dict[Hashable, Delta] = {}

    @torch.compiler.disable
    def why_dense(self) -> str | None:
        """A reason that needs no look at the call itself: policy, no step known, autograd."""
        if self._always_dense is not None:
            return self._always_dense
        if self.engine.branch is None:
            return OUTSIDE
        return AUTOGRAD if torch.is_grad_enabled() else None

    @torch.compiler.disable
    def stays_dense(self, reason: str) -> None:
        """Count a call that stays dense."""
        self.usage.dense[reason] += 1

    @property
    def cache_bytes(self) -> int:
        return sum(delta.cache_bytes for delta in self._deltas.values())

    def drop(self) -> None:
        """Drop the caches of every branch; the counts stay."""
        self._deltas.clear()

    def _delta(self) -> Delta:
        """The state of the guidance branch in hand."""
        branch = self.engine.branch
        if branch not in self._deltas:
            self._deltas[branch] = self._make()
        return self._deltas[branch]

    @abstractmethod
    def _make(self) -> Delta:
        """Fresh state for one guidance branch."""


class AttentionLayer(Layer[AttentionDelta]):
    """One attention of the model."""

    kind = "attention"

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Ranges) -> Tensor:
        """Attention of this step: q, k, v and the output are `(B, N, H, D)`, as projections give them."""
        q, k, v = q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2)
        return self._delta()(q, k, v, self.engine.step, keep).transpose(1, 2)

    def _make(self) -> AttentionDelta:
        assert self.engine.policy.attention is not None
        return AttentionDelta(self.engine.policy.attention, self._seed, self.engine.launch, self.usage)


class MlpLayer(Layer[MlpDelta]):
    """One MLP of the model.

    The transposed down-projection is made once per generation and shared by the branches. It is not kept
    longer: weights may be edited in place between generations (fusing a LoRA does), and nothing on the
    tensor tells.
    """

    kind = "mlp"
    _by_neuron: Tensor | None = None

    @torch.compiler.disable
    def run(
        self,
        x: Tensor,
        up: torch.nn.Linear,
        down: Tensor,
        down_bias: Tensor | None,
        *,
        share: bool = False,
    ) -> Tensor:
        """The MLP of this step, as `MlpDelta` gives it; `down` is `(Kout, F)`."""
        weights = MlpWeights(up.weight, up.bias, down, down_bias, functools.partial(self._transposed, down))
        return self._delta()(x, weights, self.engine.step, share=share)

    @property
    def cache_bytes(self) -> int:
        return super().cache_bytes + (0 if self._by_neuron is None else self._by_neuron.nbytes)

    def drop(self) -> None:
        """Drop the caches of every branch and the transposed weights; the counts stay."""
        super().drop()
        self._by_neuron = None

    def _transposed(self, down: Tensor) -> Tensor:
        if self._by_neuron is None:
            self._by_neuron = down.t().contiguous()
        return self._by_neuron

    def _make(self) -> MlpDelta:
        assert self.engine.policy.mlp is not None
        return MlpDelta(self.engine.policy.mlp, self._seed, self.engine.launch, self.usage)
