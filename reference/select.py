"""Choosing columns, one group at a time, by sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
SLACK = 1e-6
"""Of the goal: by so much a coverage may be missed, see `coverage_columns`."""
Ranges = Sequence[tuple[int, int]]


def mix(x: int) -> int:
    """A 32-bit integer finaliser that changes about half of the output bits for any changed input bit."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK32
    x ^= x >> 15
    x = x * 0x846CA68B & MASK32
    return x ^ x >> 16


def extras_hash(seed: int, b: int, h: int, g: int, n: int) -> int:
    """Where column n of group (b, h, g) stands in the draw of random extras: largest first, ties by lower n.

    A hash of the coordinates, not a generator's state: the same on every device and backend, in any order.
    """
    x = seed & MASK32
    for coordinate in (b, h, g, n):
        x = mix(x ^ coordinate)
    return x


def always_kept(
    group: int, columns: int, group_size: int, keep: Ranges, window: int, key_length: int
) -> set[int]:
    """The columns kept whatever their score: the ranges `[start, stop)`, a window around the group's rows.

    The window holds the columns within `window` positions of those rows; a window of 0 holds none.
    """
    kept = {n for start, stop in keep for n in range(start, stop)}
    if window > 0:
        kept |= set(range(group * group_size - window, (group + 1) * group_size + window))
    return {n for n in kept if 0 <= n < min(columns, key_length)}


def _ranking(scores: list[float], candidates: list[int]) -> list[int]:
    """Best first: descending score, NaN after everything else, ties by lower index."""
    best = [n for n in candidates if not math.isnan(scores[n])]
    worst = [n for n in candidates if math.isnan(scores[n])]
    return sorted(best, key=lambda n: (-scores[n], n)) + sorted(worst)


def _with_extras(
    kept: set[int], rest: list[int], random: int, seed: int, place: tuple[int, int, int]
) -> list[int]:
    drawn = sorted(rest, key=lambda n: (-extras_hash(seed, *place, n), n))[:random]
    return sorted(kept | set(drawn))


def _pack(lists: dict[tuple[int, int, int], list[int]], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(*shape, dtype=torch.int32)
    indices = torch.zeros(*shape, max((len(kept) for kept in lists.values()), default=0), dtype=torch.int32)
    for place, kept in lists.items():
        counts[place] = len(kept)
        indices[place][: len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return indices, counts


def _places(shape: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(b, h, g) for b in range(shape[0]) for h in range(shape[1]) for g in range(shape[2])]


def topk_columns(
    scores: Tensor,
    k: int,
    group_size: int,
    keep: Ranges = (),
    window: int = 0,
    random: int = 0,
    seed: int = 0,
    key_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Always-kept columns, the k best of the others by score, and `random` of the rest.

    scores `(B, H, G, N)` → indices int32 `(B, H, G, C)` ascending, counts int32 `(B, H, G)`; C is the largest
    count.
    """
    columns = scores.shape[3]
    length = columns if key_length is None else min(key_length, columns)
    lists = {}
    for place in _places(scores.shape):
        always = always_kept(place[2], columns, group_size, keep, window, length)
        ranking = _ranking(scores[place].tolist(), [n for n in range(length) if n not in always])
        lists[place] = _with_extras(always | set(ranking[:k]), ranking[k:], random, seed, place)
    return _pack(lists, scores.shape[:3])


def coverage_columns(
    scores: Tensor,
    coverage: float,
    group_size: int,
    max_columns: int | None = None,
    keep: Ranges = (),
    window: int = 0,
    random: int = 0,
    seed: int = 0,
    key_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Always-kept columns, then the fewest best others until all hold `coverage` of the total score.

    The score of always-kept columns counts as covered, NaN as zero; `max_columns` caps the others. Then
    `random` of the rest. Scores must not be negative. Short of full coverage the goal is a millionth lower:
    where columns hold exactly the share (0.6 of equal scores) no rounding of 0.6 must ask for one more.
    """
    columns = scores.shape[3]
    length = columns if key_length is None else min(key_length, columns)
    share = coverage if coverage == 1.0 else coverage * (1 - SLACK)
    lists = {}
    for place in _places(scores.shape):
        row = scores[place].tolist()
        mass = [0.0 if math.isnan(score) else score for score in row]
        always = always_kept(place[2], columns, group_size, keep, window, length)
        ranking = _ranking(row, [n for n in range(length) if n not in always])
        goal = share * math.fsum(mass[:length])
        covered, taken = math.fsum(mass[n] for n in always), 0
        limit = len(ranking) if max_columns is None else min(max_columns, len(ranking))
        while taken < limit and covered < goal:
            covered += mass[ranking[taken]]
            taken += 1
        lists[place] = _with_extras(always | set(ranking[:taken]), ranking[taken:], random, seed, place)
    return _pack(lists, scores.shape[:3])


def columns_from_mask(mask: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """The marked columns of mask `(B, H, G, N)`, of each group the first `capacity` by index."""
    lists = {place: mask[place].nonzero()[:, 0].tolist()[:capacity] for place in _places(mask.shape)}
    return _pack(lists, mask.shape[:3])
