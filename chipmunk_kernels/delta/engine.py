"""The engine of one model: its layers, its step clock, and what the current generation did.

It knows nothing of diffusers. An integration tells it when a forward of the root module begins and ends;
layers read the step and the guidance branch from it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch

from chipmunk_kernels.delta.attention import Ranges
from chipmunk_kernels.delta.attention import expected_density as attention_density
from chipmunk_kernels.delta.clock import StepClock
from chipmunk_kernels.delta.launch import Extent, Launch
from chipmunk_kernels.delta.layer import AttentionLayer, MlpLayer
from chipmunk_kernels.delta.mlp import expected_density as mlp_density
from chipmunk_kernels.delta.policy import Policy
from chipmunk_kernels.delta.report import Report, Usage, summarise

if TYPE_CHECKING:
    from chipmunk_kernels.profiles import Profile

FEW_GROUPS = "fewer than 2 row groups"


class Engine:
    """State of the method in one model.

    Attributes:
        policy: the plan.
        launch: an explicit profile's choice of kernels.
        step: the denoising step of the forward in progress.
        branch: its guidance branch; None between forwards.
        notes: what the report says besides; cleared with each generation.
    """

    def __init__(self, policy: Policy, profile: Profile | None = None) -> None:
        self.policy = policy
        self.launch = Launch(profile)
        self.step = 0
        self.branch: Hashable = None
        self.notes: dict[str, None] = {}
        self._clock = StepClock()
        self._layers: list[AttentionLayer | MlpLayer] = []
        self._steps: dict[Hashable, list[str]] = {}
        self._cache_bytes = 0
        self._sparse_before = 0
        self._reasons: dict[tuple[Any, ...], str | None] = {}

    def attention(self, name: str, number: int) -> AttentionLayer:
        """Register the model's `number`-th attention."""
        assert self.policy.attention is not None
        layer = AttentionLayer(self, name, number, self.policy.attention.dense_layers)
        self._layers.append(layer)
        return layer

    def mlp(self, name: str, number: int) -> MlpLayer:
        """Register the MLP of the model's `number`-th block."""
        assert self.policy.mlp is not None
        layer = MlpLayer(self, name, number, self.policy.mlp.dense_layers)
        self._layers.append(layer)
        return layer

    def begin(
        self,
        signature: Hashable,
        *,
        branch: Hashable = None,
        timestep: float | None = None,
        marker: Any = None,
    ) -> bool:
        """A forward of the root begins; arguments as `StepClock.tick`. True on a generation's first."""
        if self.branch is not None:  # the last forward raised: its caches are half of a step
            self._clock.reset()
        tick = self._clock.tick(signature, branch=branch, timestep=timestep, marker=marker)
        if tick.fresh:
            self._start()
        self.step, self.branch = tick.step, tick.branch
        self._sparse_before = self._sparse_calls()
        return tick.fresh

    def end(self) -> None:
        """The forward ended well."""
        kind = "sparse" if self._sparse_calls() > self._sparse_before else "full"
        self._steps.setdefault(self.branch, []).append(kind)
        self._cache_bytes = max(self._cache_bytes, sum(layer.cache_bytes for layer in self._layers))
        self.branch = None

    def finish(self) -> None:
        """The generation is over: drop the caches, keep what the report needs."""
        self._clock.reset()
        self.branch = None
        for layer in self._layers:
            layer.drop()

    def reset(self) -> None:
        """Drop caches, step clock and counts."""
        self.finish()
        self._start()

    def report(self) -> Report:
        """What the last generation did, or the one in progress. Syncs with the device."""
        steps = max(self._steps.values(), key=len, default=[])
        rows = ((layer.name, layer.kind, layer.usage) for layer in self._layers)
        return summarise(steps, rows, self._cache_bytes, self.notes)

    def attention_reason(
        self, extent: Extent, dtype: torch.dtype, device: torch.device, keep: Ranges
    ) -> str | None:
        """Why attention of `extent` (batch, heads, rows, columns, width) should stay dense, or None.

        `keep` are the column ranges that every group keeps besides those it chooses.
        """
        key = (extent, dtype, device, keep)
        if key not in self._reasons:
            policy = self.policy.attention
            assert policy is not None
            always = sum(stop - start for start, stop in keep)
            density = attention_density(policy, extent[3], always)
            self._reasons[key] = self.launch.why_dense(
                "sparse_attention", device, dtype, extent, policy.group_size, density
            )
        return self._reasons[key]

    def mlp_reason(self, extent: Extent, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why an MLP of `extent` (batch, 1, tokens, neurons, width) should stay dense, or None."""
        key = (extent, dtype, device)
        if key not in self._reasons:
            policy = self.policy.mlp
            assert policy is not None
            density = mlp_density(policy, extent[3])
            self._reasons[key] = (
                FEW_GROUPS
                if extent[2] <= policy.group_size
                else self.launch.why_dense("sparse_mlp", device, dtype, extent, policy.group_size, density)
            )
        return self._reasons[key]

    def _start(self) -> None:
        self._steps = {}
        self._cache_bytes = 0
        self.notes = {}
        for layer in self._layers:
            layer.drop()
            layer.usage = Usage()

    def _sparse_calls(self) -> int:
        return sum(layer.usage.sparse for layer in self._layers)
