"""Put things into a module tree and take exactly them out again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

_log = logging.getLogger(__name__)


class Patches:
    """Replaced processors, forwards and hooks, undone in reverse order.

    What somebody else replaced or wrapped meanwhile stays as they left it, with one warning: our part
    inside it then passes every call through, because outside a forward that the engine knows of nothing
    runs sparse.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], str | None]] = []
        self._processors: list[tuple[Any, Any]] = []

    def processor(self, attention: Any, processor: Any) -> None:
        """Set an attention processor. Backend and parallel settings go over to it, and back at the end."""
        stock = attention.processor
        _copy_settings(stock, processor)
        attention.set_processor(processor)
        self._processors.append((attention, processor))

        def undo() -> str | None:
            if attention.processor is not processor:
                return f"attention processor {type(attention.processor).__name__}"
            _copy_settings(processor, stock)
            attention.set_processor(stock)
            return None

        self._undo.append(undo)

    def forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Set an instance's forward."""
        before = module.__dict__.get("forward")
        module.forward = forward  # type: ignore[method-assign]

        def undo() -> str | None:
            if module.__dict__.get("forward") is not forward:
                return f"forward of {type(module).__name__}"
            if before is None:
                del module.__dict__["forward"]
            else:
                module.forward = before  # type: ignore[method-assign]
            return None

        self._undo.append(undo)

    def also(self, undo: Callable[[], Any]) -> None:
        """Anything else, by its undo."""

        def call() -> None:
            undo()

        self._undo.append(call)

    def displaced(self) -> int:
        """How many of our attention processors somebody else replaced."""
        return sum(attention.processor is not processor for attention, processor in self._processors)

    def undo(self) -> None:
        """Take everything out."""
        left = [what for step in reversed(self._undo) if (what := step()) is not None]
        self._undo.clear()
        self._processors.clear()
        if left:
            _log.warning(
                "remove_chipmunk: left as others replaced or wrapped them since: %s; take those out first",
                ", ".join(sorted(set(left))),
            )


def _copy_settings(source: Any, target: Any) -> None:
    for name in ("_attention_backend", "_parallel_config"):
        setattr(target, name, getattr(source, name, None))


def why_not_plain(linear: nn.Module, x: Tensor) -> str | None:
    """Why a linear's weight cannot be gathered from, or None.

    An un-fused LoRA wraps the linear and its `.weight` is the base weight; a quantised one has no weight in
    numbers; an offloaded one lies elsewhere until its own forward is called, which gathering goes round.
    """
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is no plain linear (un-fused LoRA, or quantised)"
    weight = linear.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"weight is a {type(weight).__name__} (quantised or distributed)"
    if weight.device != x.device:
        return f"weight is on {weight.device}, not {x.device} (offloaded)"
    if weight.dtype != x.dtype:
        return f"weight is {weight.dtype}, the input {x.dtype}".replace("torch.", "")
    if "forward" in linear.__dict__ or linear._forward_pre_hooks or linear._forward_hooks:
        return "a linear carries hooks (offloading, layerwise casting)"
    return None


def rotated(x: Tensor, tables: Any) -> Tensor:
    """`x` `(B, N, H, D)` turned by rotary tables (cos, sin), each `(N, D)`."""
    turned: Any = apply_rotary_emb(x, tables, sequence_dim=1)
    return turned


def autocasting(x: Tensor) -> str | None:
    """The reason to stay dense under autocast, where a weight's dtype is not the computation's."""
    return "autocast is on" if torch.is_autocast_enabled(x.device.type) else None
