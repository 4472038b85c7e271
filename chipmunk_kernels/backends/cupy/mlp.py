"""Launching mlp.cu: the sparse MLP delta on any GPU since Ampere, as an up- and a down-projection."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, load, prepared
from chipmunk_kernels.backends.cupy.vectors import KINDS, VECTOR_BYTES, vector_bytes, whole_vectors
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import maker
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

SCRATCH_BYTES = 64 << 20
"""Most scratch memory of a call, if one group of each batch entry fits it."""

SMALLEST_TILE = 32  # tokens
SUMS_OF_A_THREAD = 128  # registers; fragments and addresses take up to 120 more


@dataclass(frozen=True)
class SparseMlpSettings(LaunchSettings):
    """Tiles of the two kernels.

    Attributes:
        up_columns: neurons per block of the up-projection.
        up_tokens: tokens per block of the up-projection; fewer where the group has fewer.
        up_depth: model features per pipeline stage.
        up_warps, up_stages: its warps and pipeline stages. A warp of 4 owns 64×64 sums of a 128×128 tile, and
            reads shared memory a quarter less for them than one of 8.
        down_tokens: tokens per block of the down-projection; fewer where the group has fewer.
        down_width: output features per block.
        down_depth: kept neurons per pipeline stage.
        down_warps, down_stages: its warps and pipeline stages.
        band: token groups that share a weight block before the next one begins.
    """

    up_columns: int = choice(128, 64, 128, 256)
    up_tokens: int = choice(128, 64, 128)
    up_depth: int = choice(64, 32, 64)
    up_warps: int = choice(4, 4, 8)
    up_stages: int = choice(3, 2, 3, 4)
    down_tokens: int = choice(128, 64, 128)
    down_width: int = choice(128, 64, 128, 256)
    down_depth: int = choice(64, 32, 64)
    down_warps: int = choice(4, 4, 8)
    down_stages: int = choice(3, 2, 3, 4)
    band: int = choice(32, 8, 32, 128)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        rows = min(problem.group_size, problem.rows)
        for name, tile, tokens in (("up", self.up, self.up_tokens), ("down", self.down, self.down_tokens)):
            if tokens > tile_tokens(tokens, rows):
                return f"{name}_tokens {tokens} is wider than a group of {rows} rows"
            if tile.rows * tile.columns > SUMS_OF_A_THREAD * tile.threads:
                return (
                    f"{name}: {tile.rows}×{tile.columns} sums do not fit the registers of {tile.warps} warps"
                )
            if shared_memory_bytes is not None and tile.shared_bytes > shared_memory_bytes:
                return (
                    f"{name}: needs {tile.shared_bytes} bytes of shared memory, "
                    f"the device has {shared_memory_bytes}"
                )
        return None

    @property
    def up(self) -> Tile:
        return Tile(self.up_columns, self.up_tokens, self.up_depth, self.up_stages, self.up_warps)

    @property
    def down(self) -> Tile:
        return Tile(self.down_tokens, self.down_width, self.down_depth, self.down_stages, self.down_warps)


@dataclass(frozen=True)
class Tile:
    """A block's product, rows × columns with `depth` a stage."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def shared_bytes(self) -> int:
        """The stages and the column lists; the epilogue's scratch takes their place, and may be larger."""
        stages = self.stages * (self.rows + self.columns) * self.depth * 2 + 2 * self.stages * self.depth * 4
        return max(stages, self.warps * 16 * (self.columns // self.warps_across + 8) * 4)

    @property
    def warps_across(self) -> int:
        """Warps side by side, as `warps_down` in mlp.cu leaves them."""
        down = 1
        while down < self.warps and self.rows // down > self.columns * down // self.warps:
            down *= 2
        return self.warps // down

    def macros(self, name: str) -> tuple[tuple[str, int], ...]:
        return (
            (f"{name}_ROWS", self.rows),
            (f"{name}_COLUMNS", self.columns),
            (f"{name}_DEPTH", self.depth),
            (f"{name}_STAGES", self.stages),
            (f"{name}_WARPS", self.warps),
        )


@dataclass(frozen=True)
class Alignment:
    """Bytes that the rows of both caches are aligned to, and of an output element."""

    cache: int = VECTOR_BYTES
    output: int = VECTOR_BYTES
    output_word: int = 2


def tile_tokens(tokens: int, rows: int) -> int:
    """`tokens`, or the smallest power of two that covers `rows` where that is less."""
    return min(tokens, max(SMALLEST_TILE, 1 << (rows - 1).bit_length()))


def source(dtype: torch.dtype, rows: int, alignment: Alignment, settings: SparseMlpSettings) -> Source:
    """mlp.cu for groups of `rows` tokens."""
    up, down = _tiles(rows, settings)
    return Source(
        "mlp.cu",
        (
            ("KIND", KINDS[dtype]),
            *up.macros("UP"),
            *down.macros("DOWN"),
            ("BAND", settings.band),
            ("CACHE_BYTES", alignment.cache),
            ("OUTPUT_BYTES", alignment.output),
            ("OUTPUT_WORD_BYTES", alignment.output_word),
        ),
    )


@dataclass(frozen=True)
class Plan:
    """What the launches take besides addresses.

    Attributes:
        launches: up and down, for some groups after the other.
        new_packed: gives memory for the packed delta of some groups.
        readable: whether rows of x and both weights begin at multiples of 16 bytes, if they do.
    """

    launches: tuple[tuple[Callable[..., None], Callable[..., None]], ...]
    new_packed: Callable[[], Tensor]
    readable: bool


@functools.lru_cache(maxsize=1024)
def _plan(
    settings: SparseMlpSettings,
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    width_out: int,
    lists: tuple[int, ...],
    group_size: int,
    activations_start: int,
    output_start: int,
    *strides: tuple[int, ...],
) -> Plan | None:
    """One lookup a call. None: there is nothing to do.

    Args:
        shape: of x.
        lists: shape of the columns' indices.
        activations_start, output_start: bytes from a multiple of 16 to the beginning of each cache.
        strides: of x, w1, w2 and both caches.
    """
    batch, tokens, width = shape
    _, _, groups, capacity = lists
    if batch * groups * capacity * tokens * width_out == 0:
        return None
    x, w1, w2, activations, output = (each[:-1] for each in strides)
    rows = min(group_size, tokens)
    alignment = Alignment(
        vector_bytes(activations_start, dtype.itemsize, *activations, group_size),
        vector_bytes(output_start, output_dtype.itemsize, *output),
        output_dtype.itemsize,
    )
    up_kernel, down_kernel = _kernels(dtype, rows, alignment, settings, device)
    up, down = _tiles(rows, settings)
    up_blocks, up_tiles = -(-capacity // up.rows), -(-rows // up.columns)
    down_blocks, down_tiles = -(-width_out // down.columns), -(-rows // down.rows)
    pitch = -(-group_size // 8) * 8
    at_once = min(max(1, SCRATCH_BYTES // (batch * capacity * pitch * 2)), groups)
    launches = []
    for first in range(0, groups, at_once):
        some = min(at_once, groups - first)
        launch_up = prepared(
            up_kernel, device, batch * some * up_blocks * up_tiles, up.threads,
            first, some, groups, capacity, group_size, pitch, tokens, width, up_blocks, up_tiles,
            *x, *w1, *activations,
            shared_bytes=up.shared_bytes,
        )  # fmt: skip
        launch_down = prepared(
            down_kernel, device, batch * some * down_blocks * down_tiles, down.threads,
            first, some, groups, capacity, group_size, pitch, tokens, width_out, down_blocks, down_tiles,
            *w2, *output,
            shared_bytes=down.shared_bytes,
        )  # fmt: skip
        launches.append((launch_up, launch_down))
    return Plan(
        launches=tuple(launches),
        new_packed=maker((batch * at_once * capacity * pitch,), dtype, device),
        readable=vector_bytes(0, dtype.itemsize, *x, *w1, *w2) == VECTOR_BYTES,
    )


def sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2_by_neuron: Tensor,
    columns: ColumnSet,
    activation_cache: Tensor,
    output_cache: Tensor,
    activation: str,
    settings: SparseMlpSettings,
) -> None:
    """Assign kept neurons' new activations to activation_cache, add their change times w2 to output_cache.

    x `(B, M, K)`, w1 `(F, K)`, b1 `(F,)` or None, w2_by_neuron `(F, Kout)`, activation_cache `(B, F, M)`,
    output_cache `(B, M, Kout)`, in x's dtype or float32: last dimensions contiguous, other strides free; x,
    w1 and w2_by_neuron are copied where their rows do not begin at multiples of 16 bytes. Scratch: the
    packed delta, for as many groups at once as `SCRATCH_BYTES` hold (all of FLUX's: 28 MB at 30 %).

    Raises:
        ValueError: an activation other than `gelu_tanh`.
    """
    if activation != "gelu_tanh":
        raise ValueError(f"activation: the cupy backend computes 'gelu_tanh', got {activation!r}")
    indices, device = columns.indices, x.device
    x_start, w1_start, w2_start = x.data_ptr(), w1.data_ptr(), w2_by_neuron.data_ptr()
    activations, output = activation_cache.data_ptr(), output_cache.data_ptr()
    plan = _plan(
        settings, x.dtype, output_cache.dtype, device,
        x.shape, w2_by_neuron.shape[1], indices.shape, columns.group_size,
        activations % VECTOR_BYTES, output % VECTOR_BYTES,
        x.stride(), w1.stride(), w2_by_neuron.stride(), activation_cache.stride(), output_cache.stride(),
    )  # fmt: skip
    if plan is None:
        return
    if not plan.readable or (x_start | w1_start | w2_start) % VECTOR_BYTES:
        x, w1, w2_by_neuron = whole_vectors(x), whole_vectors(w1), whole_vectors(w2_by_neuron)
        return sparse_mlp(
            x, w1, b1, w2_by_neuron, columns, activation_cache, output_cache, activation, settings
        )
    indices, counts = indices.contiguous(), columns.counts.contiguous()  # copies must outlive the launches
    indices_start, counts_start = indices.data_ptr(), counts.data_ptr()
    packed = plan.new_packed()
    bias, delta = 0 if b1 is None else b1.data_ptr(), packed.data_ptr()
    for up, down in plan.launches:
        up(x_start, w1_start, bias, indices_start, counts_start, activations, delta)
        down(delta, w2_start, indices_start, counts_start, output)


@functools.cache
def _tiles(rows: int, settings: SparseMlpSettings) -> tuple[Tile, Tile]:
    """Tiles of the two kernels, no wider than a group of `rows` tokens needs."""
    up, down = settings.up, settings.down
    return (
        Tile(up.rows, tile_tokens(up.columns, rows), up.depth, up.stages, up.warps),
        Tile(tile_tokens(down.rows, rows), down.columns, down.depth, down.stages, down.warps),
    )


@functools.cache
def _kernels(
    dtype: torch.dtype, rows: int, alignment: Alignment, settings: SparseMlpSettings, device: torch.device
) -> tuple[Any, Any]:
    """The two kernels."""
    code = source(dtype, rows, alignment, settings)
    up, down = _tiles(rows, settings)
    return (
        load(code, "sparse_mlp_up", device, up.shared_bytes),
        load(code, "sparse_mlp_down", device, down.shared_bytes),
    )


def _unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why these kernels cannot run this dtype, or None."""
    return None if dtype in KINDS else f"the cupy MLP takes float16 and bfloat16; got {dtype}"


KERNELS = (Kernel("sparse_mlp", "cupy", sparse_mlp, SparseMlpSettings, _unsupported),)

SOURCES = (
    source(torch.bfloat16, 128, Alignment(), SparseMlpSettings()),
    source(torch.float16, 128, Alignment(2, 8, 4), SparseMlpSettings(up_warps=8, down_warps=8)),
)
