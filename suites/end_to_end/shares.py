"""Which share of a dense step attention and the MLP take, and the speedup that this allows at most.

Column sparsity shortens nothing else. A run that reaches 1.2× where 1.24× is the limit is finished; one that
reaches 1.2× where 3× is, is not: so every record carries its ceiling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy
from suites.end_to_end.generate import synchronize


@dataclass
class StepParts:
    """One dense step of the transformer, in milliseconds: all of it, its attention, its MLPs."""

    step_ms: float = 0.0
    attention_ms: float = 0.0
    mlp_ms: float = 0.0

    @property
    def attention_share(self) -> float:
        return self.attention_ms / self.step_ms if self.step_ms else 0.0

    @property
    def mlp_share(self) -> float:
        return self.mlp_ms / self.step_ms if self.step_ms else 0.0

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "attention_share": self.attention_share, "mlp_share": self.mlp_share}


class _AttentionClock(TorchFunctionMode):
    """Adds up the time inside `scaled_dot_product_attention`, whoever calls it."""

    def __init__(self, parts: StepParts, device: torch.device) -> None:
        super().__init__()
        self.parts, self.device = parts, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        synchronize(self.device)
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronize(self.device)
        self.parts.attention_ms += (time.perf_counter() - start) * 1e3
        return result


def _mlp_modules(transformer: nn.Module) -> list[tuple[nn.Module, float]]:
    """Every module of the blocks that is MLP, with the fraction of it that is.

    Double-stream blocks have `ff` and `ff_context`. Single-stream blocks have none: `proj_mlp`, `act_mlp`
    and the columns of `proj_out` after the attention part make it up.
    """
    found: list[tuple[nn.Module, float]] = []
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, name, ()):
            for part in ("ff", "ff_context", "proj_mlp", "act_mlp"):
                module = getattr(block, part, None)
                if isinstance(module, nn.Module):
                    found.append((module, 1.0))
            if hasattr(block, "proj_mlp"):
                found.append((block.proj_out, block.proj_mlp.out_features / block.proj_out.in_features))
    return found


@contextmanager
def measured_parts(
    transformer: nn.Module, calls: Collection[int], device: torch.device
) -> Iterator[StepParts]:
    """Within the block, take the transformer's forwards number `calls` (from 0) apart; others run untouched.

    Yields the parts of the fastest: the one that other work on the machine disturbed least. The device
    is waited for around every part, so those forwards run a little slower: take their shares, not their
    duration. Attention is what runs through `scaled_dot_product_attention`; with another backend set
    in diffusers its share reads 0.
    """
    fastest = StepParts()
    probe: _Probe | None = None
    number = -1

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal number, probe
        number += 1
        if number in calls:
            probe = _Probe(transformer, device)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal probe
        if probe is None:
            return
        parts = probe.stop()
        probe = None
        raised = output is None
        if not raised and (not fastest.step_ms or parts.step_ms < fastest.step_ms):
            fastest.step_ms, fastest.attention_ms, fastest.mlp_ms = astuple(parts)

    hooks = [
        transformer.register_forward_pre_hook(begin),
        transformer.register_forward_hook(end, always_call=True),
    ]
    try:
        yield fastest
    finally:
        for hook in hooks:
            hook.remove()


class _Probe:
    """Takes one forward apart, from its making until `stop`."""

    def __init__(self, transformer: nn.Module, device: torch.device) -> None:
        self.parts = StepParts()
        self.device = device
        self.hooks: list[Any] = []
        self.begun: dict[nn.Module, float] = {}
        for part, fraction in _mlp_modules(transformer):
            self.hooks.append(part.register_forward_pre_hook(self._begin))
            self.hooks.append(part.register_forward_hook(self._end(fraction)))
        self.clock = _AttentionClock(self.parts, device)
        self.clock.__enter__()
        self.start = self._now()

    def stop(self) -> StepParts:
        self.parts.step_ms = (self._now() - self.start) * 1e3
        self.clock.__exit__(None, None, None)
        for hook in self.hooks:
            hook.remove()
        return self.parts

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.begun[module] = self._now()

    def _end(self, fraction: float) -> Callable[[nn.Module, Any, Any], None]:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.parts.mlp_ms += fraction * (self._now() - self.begun[module]) * 1e3

        return end


def _cost(part: AttentionPolicy | MlpPolicy | None, density: float | None, steps: int, layers: int) -> float:
    """Time of a part over a whole run, relative to dense, if time were proportional to density."""
    if part is None or density is None or not layers:
        return 1.0
    sparse = (1 - len(part.schedule.full_steps(steps)) / steps) * max(0, layers - part.dense_layers) / layers
    return 1 - sparse * (1 - density)


def ceiling(
    parts: StepParts,
    policy: Policy,
    *,
    steps: int,
    layers: int,
    attention_density: float | None,
    mlp_density: float | None,
) -> dict[str, float]:
    """The most that denoising can gain: `policy`, were time proportional to density and nothing added; and
    `limit`, were attention and MLP to take no time at all (Amdahl).

    Args:
        parts: a measured dense step.
        policy: what runs sparse, and on which steps.
        steps: denoising steps.
        layers: transformer blocks.
        attention_density: kept columns over all, as achieved; None where attention stayed dense.
        mlp_density: likewise for the MLP.
    """
    attention, mlp = parts.attention_share, parts.mlp_share
    rest = max(0.0, 1 - attention - mlp)
    relative = (
        rest
        + attention * _cost(policy.attention, attention_density, steps, layers)
        + mlp * _cost(policy.mlp, mlp_density, steps, layers)
    )
    return {"policy": 1 / relative, "limit": 1 / rest if rest else float("inf")}
