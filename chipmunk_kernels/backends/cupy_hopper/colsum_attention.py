"""Launching colsum_attention.cu: dense attention that also sums each group's attention mass per column."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, load, prepared
from chipmunk_kernels.backends.cupy_hopper import FOLDER
from chipmunk_kernels.backends.cupy_hopper.tensor_maps import Layout, mappable, maps_of
from chipmunk_kernels.checks import switched_on
from chipmunk_kernels.columns import group_count
from chipmunk_kernels.layout import maker, strides_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

LOG2E = 1.4426950408889634
WIDTHS = (64, 128)
WARPGROUP_ROWS = 64
WARPGROUP_THREADS = 128
SHARED_BYTES = 227 * 1024  # that a Hopper block can have
# Of the kernel's argument, after its three tensor maps: what changes from call to call, and what does not.
_ADDRESSES, _NUMBERS = struct.Struct("<5Q"), struct.Struct("<3q6if36x")


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut: its compile-time parameters beside dtype and head dimension.

    Attributes:
        mass: whether columns are summed.
        consumers: warpgroups of 64 query rows that multiply.
        span: how many of them work on one group.
        block_n: columns taken in at a time.
        stages: tiles of keys and values in flight.
        overlap: whether a warpgroup starts the next tile's logits before it waits for this tile's output.
    """

    mass: bool
    consumers: int
    span: int
    block_n: int
    stages: int
    overlap: bool

    def shared_bytes(self, width: int) -> int:
        """Shared memory of a block: queries, tiles, two sets of column sums, barriers and a flag."""
        rows = self.consumers * WARPGROUP_ROWS + 2 * self.stages * self.block_n
        sums = 2 * 4 * self.consumers * self.block_n * 4 if self.mass else 0
        return rows * width * 2 + sums + 8 * (1 + 4 * self.stages + 4 + 1)

    def misfit(self, width: int) -> str | None:
        """Why a kernel of this shape cannot run, or would spill registers; None if it can."""
        if self.shared_bytes(width) > SHARED_BYTES:
            return f"needs {self.shared_bytes(width)} bytes of shared memory, a block has {SHARED_BYTES}"
        if self.consumers == 3 and self.overlap and self.block_n > 64:
            return (
                f"with three warpgroups a thread has 160 registers, too few to overlap {self.block_n} columns"
            )
        if self.consumers == 3 and not self.mass and self.block_n > 96 and width > 64:
            return "three warpgroups leave a thread 160 registers, too few to find anchors in 128 columns"
        return None


@dataclass(frozen=True)
class ColsumAttentionSettings(LaunchSettings):
    """Tiles of the dense attention kernel with column sums; a group's size decides on the warpgroups.

    Attributes:
        block_n: columns taken in at a time.
        stages: tiles of keys and values in flight.
        overlap: whether a warpgroup starts the next tile's logits before it waits for this tile's output,
            where registers allow that: with two warpgroups, or 64 columns.
    """

    block_n: int = choice(128, 64, 96, 128)
    stages: int = choice(2, 2, 4)
    overlap: bool = choice(True, True, False)

    def shape(self, group_size: int) -> Shape:
        """Three warpgroups or two, whichever leaves fewer of them idle in a group; three groups of 64."""
        tiles = -(-group_size // WARPGROUP_ROWS)
        consumers = 3 if tiles == 1 or -tiles % 3 <= -tiles % 2 else 2
        overlap = self.overlap and (consumers == 2 or self.block_n == 64)
        return Shape(True, consumers, 1 if tiles == 1 else consumers, self.block_n, self.stages, overlap)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        shape = self.shape(problem.group_size)
        if not self.overlap and shape == replace(self, overlap=True).shape(problem.group_size):
            return "nothing overlaps here with or without `overlap`"
        return shape.misfit(problem.width)


def source(dtype: torch.dtype, width: int, shape: Shape) -> Source:
    """colsum_attention.cu for this dtype, head dimension and shape."""
    return Source(
        "colsum_attention.cu",
        (
            ("BF16", int(dtype == torch.bfloat16)),
            ("WIDTH", width),
            ("MASS", int(shape.mass)),
            ("CONSUMERS", shape.consumers),
            ("SPAN", shape.span),
            ("BLOCK_N", shape.block_n),
            ("STAGES", shape.stages),
            ("OVERLAP", int(shape.overlap)),
            ("EVERY_LANE", int(every_lane_arrives())),
        ),
        FOLDER,
    )


def every_lane_arrives() -> bool:
    """Whether each lane, not one for its warp, arrives at the barrier that hands column sums over.

    compute-sanitizer's racecheck follows no `__syncwarp` (nor a named barrier) before one lane's arrival, and
    takes what others wrote for unordered. `CHIPMUNK_RACECHECK=1` has all of them arrive, which differs in
    nothing else and takes 298 instead of 263 ms (N 118656, H200). Read as a kernel is built.
    """
    return switched_on("CHIPMUNK_RACECHECK")


def unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why these kernels cannot run this dtype and head dimension, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"cupy_hopper attention takes float16 and bfloat16; got {dtype}"
    if width not in WIDTHS:
        return f"cupy_hopper attention takes head dimensions 64 and 128; got {width}"
    return None


class Cut(Protocol):
    """Settings that a kernel's shape follows from."""

    def shape(self, group_size: int) -> Shape: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Plan:
    """What a call takes besides addresses.

    Attributes:
        launch: of the kernel; None if there are no rows.
        maps: of q, k and v, by their addresses.
        numbers: the end of the kernel's argument.
        new_out, new_lse, new_mass: give tensors for the results.
    """

    launch: Callable[..., None] | None
    maps: Callable[..., bytes | None]
    numbers: bytes
    new_out: Callable[[], Tensor]
    new_lse: Callable[[], Tensor]
    new_mass: Callable[[], Tensor]


@functools.lru_cache(maxsize=1024)
def _plan(
    settings: Cut,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    keys_shape: tuple[int, ...],
    group_size: int,
    key_length: int | None,
    scale: float,
    *strides: tuple[int, ...],
) -> Plan:
    """What follows from the shapes of q and k and the strides of q, k and v: one lookup a call."""
    cut = settings.shape(group_size)
    (batch, heads, rows, width), columns = shape, keys_shape[2]
    groups = group_count(rows, group_size)
    keys = columns if key_length is None else max(0, min(int(key_length), columns))
    blocks = batch * heads * -(-groups // (cut.consumers // cut.span))
    queries = Layout(dtype, shape, strides[0], rows, WARPGROUP_ROWS)
    taken = [Layout(dtype, keys_shape, each, keys, cut.block_n) if keys else None for each in strides[1:]]
    out_strides = strides_like_queries(shape, strides[0])
    return Plan(
        launch=_launch(dtype, width, cut, device, blocks) if blocks else None,
        maps=maps_of(queries, *taken),
        numbers=_NUMBERS.pack(
            *out_strides[:3], heads, rows, keys, columns, groups, group_size, scale * LOG2E
        ),
        new_out=maker(shape, dtype, device, out_strides),
        new_lse=maker((batch, heads, rows), torch.float32, device),
        new_mass=maker((batch, heads, groups, columns), torch.float32, device),
    )


def _launch(
    dtype: torch.dtype, width: int, cut: Shape, device: torch.device, blocks: int
) -> Callable[..., None]:
    kernel, threads = _kernel(dtype, width, cut, device), (cut.consumers + 1) * WARPGROUP_THREADS
    return prepared(kernel, device, blocks, threads, shared_bytes=cut.shared_bytes(width))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor | None,
    group_size: int,
    key_length: int | Tensor | None,
    scale: float,
    settings: Cut,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the kernel; `lse_prev` is given exactly where its shape says mass. Returns out, lse and mass."""
    if scale <= 0:  # the kernel takes maxima before it scales
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    lengths = None
    if isinstance(key_length, Tensor):
        lengths, key_length = key_length.to(torch.int32).contiguous(), None
    plan = _plan(
        settings, q.dtype, q.device, q.shape, k.shape, group_size, key_length, scale,
        q.stride(), k.stride(), v.stride(),
    )  # fmt: skip
    out, lse, mass, previous = plan.new_out(), plan.new_lse(), None, None
    if lse_prev is not None:
        mass, previous = plan.new_mass(), lse_prev.contiguous()
    if plan.launch is None:
        return out, lse, mass
    maps = plan.maps(q.data_ptr(), k.data_ptr(), v.data_ptr())
    if maps is None:
        q, k, v = mappable(q), mappable(k), mappable(v)
        length = key_length if lengths is None else lengths
        return attend(q, k, v, lse_prev, group_size, length, scale, settings)
    addresses = _ADDRESSES.pack(
        0 if previous is None else previous.data_ptr(), 0 if lengths is None else lengths.data_ptr(),
        out.data_ptr(), lse.data_ptr(), 0 if mass is None else mass.data_ptr(),
    )  # fmt: skip
    plan.launch(maps + addresses + plan.numbers)
    return out, lse, mass


def colsum_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_prev: Tensor,
    group_size: int,
    key_length: int | Tensor | None,
    scale: float,
    settings: ColsumAttentionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its normaliser, and each column's mass, Σ exp(s − lse_prev) over a group's queries.

    Args:
        q: `(B, H, N, D)`, k and v `(B, H, Nk, D)`: any strides with D contiguous; copied only where
            rows are not 16-byte aligned.
        lse_prev: float32 `(B, H, N)`, the natural-log normalisers of an earlier call.
        group_size: queries that share a sum; the last group may be ragged.
        key_length: an int, an integer tensor `(B,)` that the kernel reads itself, or None for all.
        scale: of the logits.

    Returns:
        out `(B, H, N, D)` in the dtype and memory order of q, lse `(B, H, N)` float32, mass `(B, H, G, Nk)`
        float32, zero from `key_length` on.
    """
    out, lse, mass = attend(q, k, v, lse_prev, group_size, key_length, scale, settings)
    assert mass is not None
    return out, lse, mass


@functools.cache
def _kernel(dtype: torch.dtype, width: int, shape: Shape, device: torch.device) -> Any:
    """Compiled once for all shapes of the inputs."""
    return load(source(dtype, width, shape), "attention", device, shape.shared_bytes(width))


KERNELS = (Kernel("colsum_attention", "cupy_hopper", colsum_attention, ColsumAttentionSettings, unsupported),)

_DEFAULT = ColsumAttentionSettings()
SOURCES = (
    source(torch.bfloat16, 128, _DEFAULT.shape(192)),
    source(torch.bfloat16, 128, _DEFAULT.shape(128)),
    source(torch.float16, 64, _DEFAULT.shape(64)),
)
