"""What a generation really did: steps, achieved density, cache bytes, and why anything stayed dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from chipmunk_kernels.columns import ColumnSet

Kind = Literal["attention", "mlp"]

FEW_STEPS = 10
"""Below this many steps the full warm-up steps dominate (method notes of arXiv 2506.03275's authors)."""


@dataclass
class Selection:
    """A chosen column set: its counts (left on the device), the width it chose from, the calls using it."""

    counts: Tensor
    columns: int
    uses: int = 0


@dataclass
class Usage:
    """What one layer did in one generation. Counting costs no device work and no synchronisation."""

    full: int = 0
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    selections: list[Selection] = field(default_factory=list)

    def select(self, columns: ColumnSet, width: int) -> Selection:
        """Note a new selection among `width` columns; its user counts the uses."""
        selection = Selection(columns.counts, width)
        self.selections.append(selection)
        return selection

    def kept_of_all(self) -> tuple[int, int]:
        """Kept columns and all columns, summed over groups and sparse calls. Reads the counts (syncs)."""
        kept = total = 0
        for chosen in self.selections:
            if chosen.uses:
                kept += int(chosen.counts.sum()) * chosen.uses
                total += chosen.counts.numel() * chosen.columns * chosen.uses
        return kept, total


@dataclass(frozen=True)
class LayerReport:
    """One layer of the model. `density` is None where no call was sparse."""

    name: str
    kind: Kind
    full_calls: int
    sparse_calls: int
    dense_calls: int
    density: float | None


@dataclass(frozen=True)
class Report:
    """One generation.

    Attributes:
        steps: per denoising step, "sparse" if any layer ran sparse, else "full".
        attention_density: kept over all columns that a query may see, averaged over the sparse calls; None
        if none. mlp_density: kept over all neurons, likewise. cache_bytes: the most that caches, column
        lists and transposed weights held at the end of any step. dense_calls: why calls stayed dense, and
        how many did. sparse_calls: calls that ran sparse. full_calls: dense calls that the schedule wants,
        to refresh the caches. layers: per layer. notes: what a user should know besides.
    """

    steps: list[str]
    attention_density: float | None
    mlp_density: float | None
    cache_bytes: int
    dense_calls: dict[str, int]
    sparse_calls: int
    full_calls: int
    layers: list[LayerReport]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return asdict(self)


def density(usages: Iterable[Usage]) -> float | None:
    """Achieved density over the sparse calls of several layers; None if there were none."""
    pairs = [usage.kept_of_all() for usage in usages]
    total = sum(all_columns for _, all_columns in pairs)
    return sum(kept for kept, _ in pairs) / total if total else None


def summarise(
    steps: list[str], layers: Iterable[tuple[str, Kind, Usage]], cache_bytes: int, notes: Iterable[str]
) -> Report:
    """The report of a generation from its layers' `(name, kind, usage)`. Syncs with the device."""
    layers = list(layers)
    dense: Counter[str] = Counter()
    for _, _, usage in layers:
        dense.update(usage.dense)
    notes = list(notes)
    if 0 < len(steps) < FEW_STEPS:
        notes.append(
            f"{len(steps)} steps: the full warm-up steps dominate below {FEW_STEPS}, sparsity will not pay"
        )
    return Report(
        steps=list(steps),
        attention_density=density(usage for _, kind, usage in layers if kind == "attention"),
        mlp_density=density(usage for _, kind, usage in layers if kind == "mlp"),
        cache_bytes=cache_bytes,
        dense_calls=dict(dense),
        sparse_calls=sum(usage.sparse for _, _, usage in layers),
        full_calls=sum(usage.full for _, _, usage in layers),
        layers=[
            LayerReport(name, kind, usage.full, usage.sparse, usage.dense.total(), density([usage]))
            for name, kind, usage in layers
        ],
        notes=notes,
    )
