"""Column selection with sorts, thresholds and prefix sums; no host sync, so it serves any device.

A choice of the best is a threshold: the count-th largest key, everything above it, and of the columns that
equal it as many as are still wanted, lowest index first. Keys are 32-bit integers in the order of the
scores, which makes ties and NaN exact matters. Packing a mask is a prefix sum: a kept column's slot is the
number kept before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.settings import LaunchSettings, choice

LOWEST = -(2**31)
BYTES_PER_SCORE = 80
"""Scratch bytes that choosing takes for each score at its widest moment: int64 orders, float64 sums,
masks."""


@dataclass(frozen=True)
class SelectSettings(LaunchSettings):
    """`scratch_mib` bounds the scratch memory of one block of groups."""

    scratch_mib: int = choice(64, 8, 16, 32, 64, 128)


def topk_columns(
    scores: Tensor,
    k: int,
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    """See `ops.select.topk_columns`; `always` is bool `(G, N)`, `capacity` the room per group."""

    def choose(block: Tensor, taken: Tensor) -> Tensor:
        return _largest(_ordered(block), ~taken, k)

    return _select(scores, choose, always, random, seed, key_length, capacity, settings)


def coverage_columns(
    scores: Tensor,
    coverage: float,
    max_columns: int,
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    """See `ops.select.coverage_columns`; `max_columns` caps the columns chosen by score."""

    def choose(block: Tensor, taken: Tensor) -> Tensor:
        # Columns past the key length count as taken, and so as covered: they must weigh nothing.
        mass = block.double().nan_to_num(nan=0.0)
        mass[:, key_length:] = 0.0
        return _reaching(_ordered(block), mass, taken, coverage, max_columns)

    return _select(scores, choose, always, random, seed, key_length, capacity, settings)


def columns_from_mask(mask: Tensor, capacity: int, settings: SelectSettings) -> tuple[Tensor, Tensor]:
    """See `ops.select.columns_from_mask`."""
    flat = mask.reshape(-1, mask.shape[3])
    indices, counts = _empty(flat, capacity)
    for rows in _blocks(flat, settings):
        _pack(flat[rows], indices[rows], counts[rows])
    return indices.view(*mask.shape[:3], capacity), counts.view(mask.shape[:3])


def _select(
    scores: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
    always: Tensor | None,
    random: int,
    seed: int,
    key_length: int,
    capacity: int,
    settings: SelectSettings,
) -> tuple[Tensor, Tensor]:
    """Block by block: the always-kept columns, those that `choose` adds, the random extras; packed."""
    batch, heads, groups, columns = scores.shape
    flat = scores.reshape(-1, columns)
    indices, counts = _empty(flat, capacity)
    beyond = torch.arange(columns, device=scores.device) >= key_length
    rows_seed = _rows_seed(seed, batch, heads, groups, scores.device)
    for rows in _blocks(flat, settings):
        block = flat[rows]
        kept = torch.zeros_like(block, dtype=torch.bool)
        if always is not None:
            kept |= always[torch.arange(rows.start, rows.stop, device=scores.device) % groups]
        kept |= choose(block, kept | beyond)
        if random:
            kept |= _largest(_hash(rows_seed[rows], columns), ~(kept | beyond), random)
        _pack(kept, indices[rows], counts[rows])
    return indices.view(batch, heads, groups, capacity), counts.view(batch, heads, groups)


def _ordered(scores: Tensor) -> Tensor:
    """int32 keys in the order of the scores: equal scores (0 and −0 too) have equal keys, NaN the lowest."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(scores.isnan(), LOWEST)


def _largest(keys: Tensor, eligible: Tensor, count: int) -> Tensor:
    """Mask of the `count` eligible columns with the largest keys, or of all if there are fewer."""
    if count == 0:
        return torch.zeros_like(eligible)
    keys = keys.masked_fill(~eligible, LOWEST)
    threshold = keys.topk(min(count, keys.shape[1]), sorted=False).values.amin(1, keepdim=True)
    above = keys > threshold
    ties = (keys == threshold) & eligible
    wanted = count - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (ties & (ties.cumsum(1, dtype=torch.int32) <= wanted))


def _reaching(keys: Tensor, mass: Tensor, taken: Tensor, coverage: float, limit: int) -> Tensor:
    """Mask of the fewest best columns not taken that bring the mass up to `coverage` of the total."""
    order = keys.masked_fill(taken, LOWEST).sort(dim=1, descending=True, stable=True).indices
    start = (mass * taken).sum(1, keepdim=True)
    ranked = (mass * ~taken).gather(1, order)
    reached = start + ranked.cumsum(1)
    # A column is needed where all before it fall short. float64 sums keep that exact to about 1e-12 of the
    # total.
    needed = (reached - ranked < coverage * reached[:, -1:]).sum(1, keepdim=True).clamp_(max=limit)
    chosen = torch.arange(keys.shape[1], device=keys.device) < needed
    return torch.zeros_like(taken).scatter_(1, order, chosen) & ~taken


def _pack(kept: Tensor, indices: Tensor, counts: Tensor) -> None:
    """Write the columns marked in each row, in ascending order, as many as there is room for."""
    capacity = indices.shape[1]
    place = kept.cumsum(1, dtype=torch.int32)
    counts.copy_(place[:, -1].clamp(max=capacity))
    # Everything not kept lands in one spare slot at the end.
    slot = torch.where(kept & (place <= capacity), place - 1, capacity).long()
    columns = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device).expand_as(slot)
    packed = torch.zeros(len(kept), capacity + 1, dtype=torch.int32, device=kept.device)
    indices.copy_(packed.scatter_(1, slot, columns)[:, :capacity])


def _rows_seed(seed: int, batch: int, heads: int, groups: int, device: torch.device) -> Tensor:
    """The hash state of every group, int32 `(B·H·G, 1)`, before the column enters."""
    state = torch.full((), _signed(seed), dtype=torch.int32, device=device)
    for axis, size in enumerate((batch, heads, groups)):
        coordinate = torch.arange(size, dtype=torch.int32, device=device)
        state = _mix(state ^ coordinate.view([-1 if i == axis else 1 for i in range(3)]))
    return state.reshape(-1, 1)


def _hash(rows_seed: Tensor, columns: int) -> Tensor:
    """int32 keys whose signed order is the unsigned order of the extras' hash."""
    n = torch.arange(columns, dtype=torch.int32, device=rows_seed.device)
    return _mix(rows_seed ^ n) ^ LOWEST


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser in int32, which wraps as uint32 does; right shifts drop the copied sign bits."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(x: int) -> int:
    """The int32 with the low 32 bits of x."""
    return ((x & 0xFFFFFFFF) ^ 2**31) - 2**31


def _empty(flat: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return flat.new_empty(len(flat), capacity, dtype=torch.int32), flat.new_empty(
        len(flat), dtype=torch.int32
    )


def _blocks(flat: Tensor, settings: SelectSettings) -> Iterator[slice]:
    step = max(1, (settings.scratch_mib << 20) // (BYTES_PER_SCORE * flat.shape[1]))
    for start in range(0, len(flat), step):
        yield slice(start, min(start + step, len(flat)))
