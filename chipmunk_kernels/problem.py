"""Problem: one operation with concrete shapes. What gets tuned, stored and looked up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

OPERATIONS = (
    "dense_attention",
    "colsum_attention",
    "sparse_attention",
    "topk_columns",
    "gather_columns",
    "scatter_columns",
    "sparse_mlp",
    "group_mean",
)

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Problem:
    """An operation with its shapes.

    Attributes:
        operation: one of `OPERATIONS`.
        batch: B.
        heads: H; 1 for the MLP family.
        rows: queries, or MLP tokens (N or M).
        columns: keys, or hidden neurons.
        width: head dimension, or the model width that an MLP reads and writes.
        dtype: torch dtype name without the `torch.` prefix.
        group_size: rows that share one column selection.
        density: kept columns over all columns, in (0, 1]; 1 for operations that keep all.

    Raises:
        ValueError: an unknown operation or dtype, a size below 1, a density outside (0, 1].
    """

    operation: str
    rows: int
    columns: int
    width: int
    batch: int = 1
    heads: int = 1
    dtype: str = "bfloat16"
    group_size: int = 128
    density: float = 1.0

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation: expected one of {', '.join(OPERATIONS)}; got {self.operation!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for name in ("batch", "heads", "rows", "columns", "width", "group_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density: expected a fraction in (0, 1], got {self.density!r}")

    @property
    def groups(self) -> int:
        return -(-self.rows // self.group_size)

    @property
    def kept_columns(self) -> int:
        """Columns each group keeps: the density rounded to the nearest whole column, at least one."""
        return max(1, min(self.columns, round(self.columns * self.density)))

    @property
    def key(self) -> str:
        """Short stable identity, e.g. `sparse_attention b1 h24 r4352 c4352 w128 bfloat16 g128 d0.165`."""
        return (
            f"{self.operation} b{self.batch} h{self.heads} r{self.rows} c{self.columns} w{self.width} "
            f"{self.dtype} g{self.group_size} d{self.density:g}"
        )

    def distance(self, other: Problem) -> float:
        """How unlike two problems are: log distance in work and aspect; infinite where no kernel serves both.

        Operation, dtype and width must agree (they select the compiled kernel). Group size counts as aspect.
        """
        if (self.operation, self.dtype, self.width) != (other.operation, other.dtype, other.width):
            return math.inf
        pairs = (
            (self.batch * self.heads * self.groups, other.batch * other.heads * other.groups),
            (self.columns, other.columns),
            (self.density, other.density),
            (self.group_size, other.group_size),
        )
        return math.sqrt(sum(math.log(a / b) ** 2 for a, b in pairs))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Problem:
        """A problem from a profile or workload entry. Raises ValueError naming unknown or missing fields."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"problem: unknown fields {unknown}; expected among {sorted(known)}")
        missing = sorted({"operation", "rows", "columns", "width"} - set(values))
        if missing:
            raise ValueError(f"problem: missing fields {missing}")
        return cls(**values)
