"""The attention delta of one layer and one guidance branch. Source: arXiv 2506.03275, section 4.

Two ways to put the fresh selected part and the cached unselected part together:

    delta   cache   O − softmax(q K[cols]ᵀ) V[cols]         sparse step   cache + softmax(q K[cols]ᵀ) V[cols]
    lse     cache   (O_rest, lse_rest), the unselected      sparse step   both parts merged by their log
            columns as a partial softmax                                  normalisers

`delta` weighs the selected part by its own normaliser in both lines, so a shift of mass between selected and
unselected columns goes unseen; `lse` sees it. Both cost the same reads; `lse` merges in a second pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet, group_count
from chipmunk_kernels.delta.launch import Launch
from chipmunk_kernels.delta.policy import AttentionPolicy
from chipmunk_kernels.delta.report import Selection, Usage
from chipmunk_kernels.delta.side import Side
from chipmunk_kernels.ops.attention import colsum_attention, dense_attention, sparse_attention
from chipmunk_kernels.ops.select import topk_columns

Ranges = tuple[tuple[int, int], ...]

MASS_BYTES = 1 << 30
"""Column masses are float32 (B, H, G, N): 7 GB at HunyuanVideo's size. Full steps take as many heads at once
as fit in this, twice: while columns are chosen from the masses of some heads, the next heads' are summed."""

EMPTY_SHARE = 1e-5
"""`lse` form: a row whose unselected columns hold less than this share of its mass keeps none of them.
Below it the difference of two normalisers in float32 is mostly rounding."""


TRUST = 4.0
"""`lse` form: the cached part may weigh at most so many times its share when it was cached. Its error is that
of a difference of two rounded outputs, about eps·|O| over that share, so this bounds its error in the result
by a few roundings. Rows whose cached share was a quarter or more are not bounded at all."""


@dataclass
class AttentionDelta:
    """State of one layer and one guidance branch; call it once per step.

    Full step: dense attention. If the next step is sparse, also choose the columns and cache the unselected
    part. The column mass needs the normaliser of an earlier step (`lse_prev`); where there is none (the
    first full step is followed by a sparse one, `schedule.first == 1`) the step's own normaliser takes its
    place: dense attention first, then the column sums, one pass more on that step, and the mass is then
    exactly each column's share of attention.

    A sparse step whose caches are older than the schedule's last full step (another cache skipped this
    layer then) runs full.

    Attributes:
        policy: what to keep and when.
        seed: seeds the random extras, together with the step.
        launch: an explicit profile's choice of kernels.
        usage: where calls and selections are counted.
    """

    policy: AttentionPolicy
    seed: int = 0
    launch: Launch = field(default_factory=Launch)
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop every cache."""
        self.columns: ColumnSet | None = None
        self._lse: Tensor | None = None
        self._rest: Tensor | None = None
        self._rest_lse: Tensor | None = None
        self._refreshed: int | None = None
        self._selection: Selection | None = None
        self._extent: tuple[object, ...] = ()

    @property
    def cache_bytes(self) -> int:
        held = (self._lse, self._rest, self._rest_lse, self.columns)
        return sum(part.nbytes for part in held if part is not None)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, step: int, keep: Ranges = ()) -> Tensor:
        """Attention output `(B, H, N, D)`, never one of the caches.

        Args:
            q, k, v: `(B, H, N, D)`; keys and values may be shorter than queries.
            step: number of the denoising step, from the step clock.
            keep: column ranges that every group keeps (text).
        """
        extent = (q.shape, k.shape, q.dtype, q.device)
        if extent != self._extent:
            self.reset()
            self._extent = extent
        fresh = self._refreshed is not None and self._refreshed >= self.policy.schedule.last_full(step)
        if fresh and not self.policy.schedule.is_full(step):
            self.usage.sparse += 1
            return self._sparse(q, k, v)
        self.usage.full += 1
        return self._full(q, k, v, step, keep)

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.columns is not None and self._rest is not None and self._selection is not None
        self._selection.uses += 1
        if self._rest_lse is None:
            return self._selected(q, k, v, base=self._rest)[0]
        assert self._lse is not None
        return merge(self._rest, self._rest_lse, self._lse, *self._selected(q, k, v))

    def _full(self, q: Tensor, k: Tensor, v: Tensor, step: int, keep: Ranges) -> Tensor:
        # Freed before their successors are made, so that the peak holds one set of caches.
        self.columns = self._rest = self._rest_lse = None
        self._refreshed = None
        if self.policy.schedule.is_full(step + 1):
            out, self._lse = dense_attention(q, k, v, **self._launch("dense_attention", q, k))
            return out
        out, self.columns = self._choose(q, k, v, step, keep)
        self._cache_rest(q, k, v, out)
        self._selection = self.usage.select(self.columns, k.shape[2])
        self._refreshed = step
        return out

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, step: int, keep: Ranges) -> tuple[Tensor, ColumnSet]:
        """Dense output, and the columns to keep, for as many heads at a time as `MASS_BYTES` has room for."""
        heads, size = q.shape[1], self.policy.group_size
        per_head = 4 * q.shape[0] * group_count(q.shape[2], size) * k.shape[2]
        at_once = max(1, min(heads, MASS_BYTES // per_head))
        outs, lses, sets = [], [], []
        mass = None
        with Side(q.device) as side:
            for first in range(0, heads, at_once):
                part = slice(first, first + at_once)
                lse = None if self._lse is None else self._lse[:, part]
                out, lse, next_mass = self._sum_columns(q[:, part], k[:, part], v[:, part], lse)
                side.join()  # the last selection ran beside those sums; its masses may go now
                mass = next_mass
                with side.fork():
                    sets.append(self._choose_columns(mass, step, first, keep))
                outs.append(out)
                lses.append(lse)
        del mass
        if len(sets) == 1:
            self._lse = lses[0]
            return outs[0], sets[0]
        self._lse = torch.cat(lses, 1)
        return torch.cat(outs, 1), _join_heads(sets)

    def _sum_columns(
        self, q: Tensor, k: Tensor, v: Tensor, lse_prev: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Dense output, its log normalisers, and the column masses."""
        if lse_prev is None:
            _, lse_prev = dense_attention(q, k, v, **self._launch("dense_attention", q, k))
        return colsum_attention(
            q, k, v, lse_prev, self.policy.group_size, **self._launch("colsum_attention", q, k)
        )

    def _choose_columns(self, mass: Tensor, step: int, first_head: int, keep: Ranges) -> ColumnSet:
        policy, width = self.policy, mass.shape[3]
        return topk_columns(
            mass,
            round(policy.keep * width),
            group_size=policy.group_size,
            keep=keep,
            window=policy.window,
            random=round(policy.random * width),
            seed=mix_seed(self.seed, step, first_head),
            **self._launch_topk(mass, keep),
        )

    def _cache_rest(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        assert self.columns is not None and self._lse is not None
        if self.policy.merge == "delta":
            self._rest = self._selected(q, k, v, base=out, sign=-1)[0]
            return
        everything = (self.columns.counts >= k.shape[2]).repeat_interleave(self.policy.group_size, dim=2)
        self._rest, self._rest_lse = remainder(
            out, self._lse, *self._selected(q, k, v), everything[:, :, : q.shape[2]]
        )

    def _selected(
        self, q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None, sign: int = 1
    ) -> tuple[Tensor, Tensor]:
        """base + sign · softmax over the selected columns, and its log normaliser."""
        assert self.columns is not None
        launch = self._launch("sparse_attention", q, k, self.columns)
        out = sparse_attention(q, k, v, self.columns, base=base, sign=sign, return_lse=True, **launch)
        return cast(tuple[Tensor, Tensor], out)

    def _launch_topk(self, mass: Tensor, keep: Ranges) -> dict[str, Any]:
        batch, heads, groups, columns = mass.shape
        size, always = self.policy.group_size, sum(stop - start for start, stop in keep)
        extent = (batch, heads, groups * size, columns, 1)
        density = expected_density(self.policy, columns, always)
        return self.launch("topk_columns", mass.device, mass.dtype, extent, size, density)

    def _launch(
        self, operation: str, q: Tensor, k: Tensor, columns: ColumnSet | None = None
    ) -> dict[str, Any]:
        if self.launch.profile is None:
            return {}
        batch, heads, rows, width = q.shape
        density = 1.0 if columns is None else columns.capacity / k.shape[2]
        extent = (batch, heads, rows, k.shape[2], width)
        return self.launch(operation, q.device, q.dtype, extent, self.policy.group_size, density)


def expected_density(policy: AttentionPolicy, columns: int, always: int = 0) -> float:
    """Density that the policy asks for, `always` kept columns and the window included, at most 1."""
    if policy.window:
        always += policy.group_size + 2 * policy.window
    wanted = always + round(policy.keep * columns) + round(policy.random * columns)
    return min(1.0, wanted / columns)


def remainder(
    out: Tensor, lse: Tensor, chosen: Tensor, chosen_lse: Tensor, everything: Tensor
) -> tuple[Tensor, Tensor]:
    """The unselected columns as a partial softmax: `(O_rest, lse_rest)` from the whole and the selected part.

    With p the selected share exp(chosen_lse − lse): O_rest = (out − p·chosen) / (1 − p), lse_rest = lse +
    log(1 − p). Rows that selected everything (`everything`, bool like `lse`) or nearly all of their mass
    get O_rest = 0 and lse_rest = −∞, which `merge` ignores.
    """
    share = (chosen_lse - lse).exp().clamp(max=1.0)
    empty = everything | (1.0 - share < EMPTY_SHARE)
    left = torch.where(empty, 1.0, 1.0 - share)
    rest = (out.float() - share.unsqueeze(-1) * chosen.float()) / left.unsqueeze(-1)
    rest.masked_fill_(empty.unsqueeze(-1), 0.0)
    return rest.to(out.dtype), (lse + left.log()).masked_fill(empty, -math.inf)


def merge(rest: Tensor, rest_lse: Tensor, lse: Tensor, fresh: Tensor, fresh_lse: Tensor) -> Tensor:
    """Two partial softmaxes as one, weighed by their normalisers; one of −∞ has no weight.

    `rest` had the share exp(rest_lse − lse) of its row when cached, and gets at most `TRUST` times that.
    """
    share = (rest_lse - lse).exp()
    weight = torch.minimum(torch.sigmoid(rest_lse - fresh_lse), TRUST * share).unsqueeze(-1)
    return torch.lerp(fresh.float(), rest.float(), weight).to(fresh.dtype)


def mix_seed(*parts: int) -> int:
    """One seed from several numbers, so that layers, steps and head chunks draw different random columns."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 31)
    return mixed


def _join_heads(sets: Sequence[ColumnSet]) -> ColumnSet:
    capacity = max(columns.capacity for columns in sets)
    padded = [torch.nn.functional.pad(columns.indices, (0, capacity - columns.capacity)) for columns in sets]
    return ColumnSet(
        torch.cat(padded, 1), torch.cat([columns.counts for columns in sets], 1), sets[0].group_size
    )
