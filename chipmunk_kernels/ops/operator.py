"""How operators are registered with PyTorch.

As `torch.library.custom_op` does it, but without passing through Python for autograd and for a check of
aliasing at each call: 4 µs of the host instead of 13. These operators have no derivative; a backward pass
through one warns and gives no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

NAMESPACE = "chipmunk"
_library = torch.library.Library(NAMESPACE, "DEF")


class Operator:
    """`torch.ops.chipmunk.<name>`, to be called and to be given a fake kernel.

    Args:
        name: of the operator.
        function: runs it on any device; its annotations are the schema.
        mutates: names of the arguments that it writes.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, _untracked(function, mutates), "CompositeExplicitAutograd")
        self._run = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *arguments: Any) -> Any:
        return self._run(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates what gives the outputs' shapes, dtypes and strides without computing them."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", function, lib=_library)
        return function


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes an `Operator` of a function."""
    return lambda function: Operator(name, function, mutates)


def _untracked(function: Callable[..., Any], mutates: Sequence[str]) -> Callable[..., Any]:
    """Out of autograd's sight, but for a version counted of each tensor written: by that it knows that what
    it saved has changed."""
    names = function.__code__.co_varnames
    written = [names.index(name) for name in mutates]

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = function(*arguments)
        for place in written:
            tensor: Tensor = arguments[place]
            if not tensor.is_inference():
                increment_version(tensor)
        return result

    return run
