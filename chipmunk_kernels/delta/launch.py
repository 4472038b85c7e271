"""Launch: hand an explicit profile's choice to the operations, and say when a problem had better stay dense.

Without an explicit profile the operations look up the device's own (`profiles.find`) by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chipmunk_kernels import dispatch
from chipmunk_kernels.problem import DTYPES, Problem

if TYPE_CHECKING:
    from chipmunk_kernels.profiles import Profile

Extent = tuple[int, int, int, int, int]
"""(batch, heads, rows, columns, width), as `Problem` names them."""


class Launch:
    """Backend and settings of each operation under one profile, decided once per problem."""

    def __init__(self, profile: Profile | None = None) -> None:
        self.profile = profile
        self._chosen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __call__(
        self,
        operation: str,
        device: torch.device,
        dtype: torch.dtype,
        extent: Extent,
        group_size: int,
        density: float = 1.0,
    ) -> dict[str, Any]:
        """The operation's `backend` and `settings` arguments; none without an explicit profile."""
        if self.profile is None:
            return {}
        key = (operation, device, dtype, extent, group_size, density)
        if key not in self._chosen:
            problem = _problem(operation, dtype, extent, group_size, density)
            kernel, settings = dispatch.select(problem, device, profile=self.profile)
            self._chosen[key] = {"backend": kernel.backend, "settings": settings}
        return self._chosen[key]

    def why_dense(
        self,
        operation: str,
        device: torch.device,
        dtype: torch.dtype,
        extent: Extent,
        group_size: int,
        density: float,
    ) -> str | None:
        """Why a sparse problem should stay dense: no kernel can run it, or dense is known to be faster."""
        if str(dtype).removeprefix("torch.") not in DTYPES:
            return f"no kernel for {dtype}".replace("torch.", "")
        problem = _problem(operation, dtype, extent, group_size, density)
        try:
            dispatch.select(problem, device, profile=self.profile)
        except RuntimeError as error:
            return str(error)
        if dispatch.dense_is_better(problem, device, self.profile):
            return "density above the crossover"
        return None


def _problem(operation: str, dtype: torch.dtype, extent: Extent, group_size: int, density: float) -> Problem:
    batch, heads, rows, columns, width = extent
    return Problem(
        operation,
        rows=rows,
        columns=columns,
        width=width,
        batch=batch,
        heads=heads,
        dtype=str(dtype).removeprefix("torch."),
        group_size=group_size,
        density=min(1.0, max(density, 1 / columns)),
    )
