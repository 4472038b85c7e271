"""Launching mlp.cu: the sparse MLP delta in one persistent launch.

Tiles are counted over the capacity, since the counts stay on the device; tiles past a group's count cost a
claim each. The up-projection runs `lead` bands of token groups ahead of the down-projection, far enough that
a down tile seldom waits; the packed delta between them lives in a ring of a few more than `lead` bands,
enough that an up tile seldom waits for its place there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.module import Source, load, prepared
from chipmunk_kernels.backends.cupy_hopper.tensor_maps import Layout, maps_of
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import maker
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import Kernel, UnsuitableInputError
from chipmunk_kernels.settings import LaunchSettings, choice

FOLDER = Path(__file__).parent
ROW_BYTES = 128
"""Bytes of a shared tile's row: 64 elements, the depth of a pipeline stage."""
ALIGNED_ELEMENTS = 8
"""Elements of 16 bytes, what a gather moves at once: widths and strides of the matrices are multiples."""
ALIGNED_BYTES = 16
WARPGROUP = 128
SHARED_BYTES = 227 * 1024
WARPGROUP_TOKENS = 64
ELEMENT_BYTES = 2
SPARE_WAVES = 2
"""Tiles per multiprocessor between the last that reads a place in the ring and the next that writes there.

Where a video's ring had less than one, up tiles waited: 10.8, not 10.4 ms for 119056 tokens on an H200.
"""

RING_BYTES = 48 << 20
"""Of packed delta at most: L2 (50 MB on an H100, 60 on an H200) can hold it, and a call may take 64 MiB."""


@dataclass(frozen=True)
class SparseMlpSettings(LaunchSettings):
    """Tiles and their order.

    Attributes:
        token_warpgroups: warpgroups side by side along the tokens, 64 each; fewer where groups are smaller.
        width_warpgroups: warpgroups along the kept neurons (up) or output features (down).
        width: neurons or features of each.
        stages: of the pipeline, 64 model features (up) or kept neurons (down) each.
        band: token groups that share a block of weights before the next one begins, at most. A band reads
            most of the weights, more than L2 holds, from memory: the more groups, the less often. But a
            band's last up tiles keep all of its down tiles waiting: FLUX's 30 groups do best as 20 to 24
            and the rest.
        lead_waves: how far up tiles run ahead of down tiles, in tiles per multiprocessor.
        adds_in_l2: whether the output cache is added to where it is, nobody waiting for its old entries; the
            product is rounded to the cache's type first, as PyTorch does.
    """

    token_warpgroups: int = choice(2, 1, 2)
    width_warpgroups: int = choice(1, 1, 2)
    width: int = choice(256, 128, 192, 256)
    stages: int = choice(4, 3, 4, 5, 6)
    band: int = choice(20, 1, 2, 4, 8, 10, 16, 20, 24, 32)
    lead_waves: int = choice(1, 1, 2, 3)
    adds_in_l2: int = choice(1, 0, 1)

    @classmethod
    def presets(cls) -> tuple[SparseMlpSettings, ...]:
        # Of FLUX's 30 groups on an H200: with 1280 / 2560 / 3584 neurons kept 20 at once take 125.9 / 212 /
        # 273.8 us, 24 take 125.0 / 215 / 274.8, 10 take 128.1 / 214.8 / 280.4.
        return cls(band=24), cls(band=10), cls(lead_waves=2)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        if fitted(self, min(problem.group_size, problem.rows)) != self:
            return f"{self.token_warpgroups} × 64 tokens are more than a group of {problem.group_size} has"
        if self.token_warpgroups * self.width_warpgroups * self.width > 512:
            return "the accumulators take more registers than there are"
        needed = shared_bytes(self)
        if needed > (shared_memory_bytes or SHARED_BYTES):
            return (
                f"needs {needed} bytes of shared memory, the device has {shared_memory_bytes or SHARED_BYTES}"
            )
        return None


def fitted(settings: SparseMlpSettings, rows: int) -> SparseMlpSettings:
    """The settings, for groups of `rows` tokens: two warpgroups share what would fill only one's tokens."""
    if rows > WARPGROUP_TOKENS or settings.token_warpgroups == 1:
        return settings
    return SparseMlpSettings(1, 2, 128, 4, settings.band, settings.lead_waves, settings.adds_in_l2)


def shared_bytes(settings: SparseMlpSettings) -> int:
    """Dynamic shared memory of a block; the order is that of mlp.cu."""
    warpgroups = settings.token_warpgroups * settings.width_warpgroups
    wide = settings.width_warpgroups * settings.width
    stage = (settings.token_warpgroups * WARPGROUP_TOKENS + wide) * ROW_BYTES
    staging, bias, tiles = 2 * 64 * ROW_BYTES, 2 * settings.width, 2 * 48
    barriers = 8 * (2 * settings.stages + 4)
    alignment = 8 * ROW_BYTES
    return settings.stages * stage + warpgroups * (staging + bias) + tiles + barriers + alignment


def source(
    dtype: torch.dtype, float_output: bool, settings: SparseMlpSettings, timeline: bool = False
) -> Source:
    """mlp.cu for an element type, the output cache's, and tiles; `timeline`: record after the counters."""
    return Source(
        "mlp.cu",
        (
            ("BF16", int(dtype == torch.bfloat16)),
            ("FLOAT_OUTPUT", int(float_output)),
            ("TOKEN_WARPGROUPS", settings.token_warpgroups),
            ("WIDTH_WARPGROUPS", settings.width_warpgroups),
            ("WIDTH", settings.width),
            ("STAGES", settings.stages),
            ("ADD_IN_L2", settings.adds_in_l2),
            ("TIMELINE", int(timeline)),
        ),
        FOLDER,
    )


@dataclass(frozen=True)
class Plan:
    """What a launch needs beyond its tensors; one for each shape.

    Attributes:
        launch: of the kernel, with all arguments but tensors.
        maps: of x, by its address.
        new_packed: gives memory for the ring of packed deltas.
        counters: claimed tiles, blocks that are done, and for each part of each group, warpgroups that wrote
            its delta, and read it.
    """

    launch: Callable[..., None]
    maps: Callable[..., bytes | None]
    new_packed: Callable[[], Tensor]
    counters: int


class Order(NamedTuple):
    """In which order tiles are claimed, and what of the packed delta is kept.

    Attributes:
        band: token groups that share a block of weights.
        lead: bands of up tiles before the first down tile.
        ring: token groups whose packed delta there is room for.
        parts: tiles along a group's tokens.
        row_elements: of a token group's packed delta.
    """

    band: int
    lead: int
    ring: int
    parts: int
    row_elements: int

    @property
    def packed_elements(self) -> int:
        """Of the whole ring."""
        return self.ring * self.row_elements


def order(
    settings: SparseMlpSettings,
    rows: int,
    capacity: int,
    width_out: int,
    group_rows: int,
    multiprocessors: int,
) -> Order:
    """The order for `rows` token groups over the whole batch, in bands so small that `RING_BYTES` suffice."""
    wide = settings.width_warpgroups * settings.width
    box_rows = settings.token_warpgroups * WARPGROUP_TOKENS
    parts = -(-group_rows // box_rows)
    up_blocks, down_blocks = -(-capacity // wide), -(-width_out // wide)
    row_elements = parts * up_blocks * wide * box_rows

    def of(band: int) -> Order:
        up = band * parts * up_blocks
        lead = min(-(-rows // band), -(-settings.lead_waves * multiprocessors // up))
        # One band that is being read, and those whose tiles come until it has been.
        spare = 1 + -(-SPARE_WAVES * multiprocessors // (up + band * parts * down_blocks))
        return Order(band, lead, min(rows, (lead + spare) * band), parts, row_elements)

    orders = (of(band) for band in range(min(settings.band, rows), 0, -1))
    return next((it for it in orders if it.packed_elements * ELEMENT_BYTES <= RING_BYTES), of(1))


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
    factors_start: int,
    activations_start: int,
    output_start: int,
    *strides: tuple[int, ...],
) -> Plan | None:
    """One lookup a call. None: there is nothing to do.

    Args:
        shape: of x.
        lists: shape of the columns' indices.
        factors_start, activations_start, output_start: nought if x and both weights, and each cache, begin at
            a multiple of 16 bytes.
        strides: of x, w1, w2 and both caches.
    """
    batch, tokens, width = shape
    _, _, groups, capacity = lists
    if batch * tokens * width * groups * capacity * width_out == 0:
        return None
    _check_readable(width, width_out, strides[:3], dtype, factors_start == 0)
    rows, group_rows = batch * groups, min(group_size, tokens)
    settings = fitted(settings, group_rows)
    multiprocessors = _multiprocessors(device)
    tiles = order(settings, rows, capacity, width_out, group_rows, multiprocessors)
    warpgroups = settings.token_warpgroups * settings.width_warpgroups
    box_rows = settings.token_warpgroups * WARPGROUP_TOKENS
    shared = shared_bytes(settings)
    x, w1, w2, activations, output = strides
    whole_activations = _whole_chunks(activations, dtype) and group_size % ALIGNED_ELEMENTS == 0
    launch = prepared(
        load(source(dtype, output_dtype == torch.float32, settings), "sparse_mlp", device, shared),
        device, multiprocessors, (warpgroups + 1) * WARPGROUP,
        rows, groups, capacity, group_size, tokens, width, width_out,
        w1[0], w2[0], *activations[:2], *output[:2],
        int(activations_start == 0 and whole_activations),
        int(output_start == 0 and _whole_chunks(output, output_dtype)),
        tiles.band, tiles.lead, tiles.ring,
        shared_bytes=shared,
    )  # fmt: skip
    return Plan(
        launch=launch,
        maps=maps_of(Layout(dtype, (batch, 1, tokens, width), (x[0], 0, *x[1:]), tokens, box_rows)),
        new_packed=maker((tiles.packed_elements,), dtype, device),
        counters=2 + 2 * rows * tiles.parts,
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
    output_cache `(B, M, Kout)` in x's dtype or float32: last dimensions contiguous; x, w1 and w2_by_neuron in
    rows of whole 16 bytes, the caches best so. Scratch: the packed delta of the groups between the two
    products, in x.dtype (29 MB for FLUX at 30 %, at most `RING_BYTES` unless single groups take more), and
    the counters.

    Raises:
        ValueError: an activation other than `gelu_tanh`.
        UnsuitableInputError: rows that 16-byte loads cannot read.
    """
    if activation != "gelu_tanh":
        raise ValueError(f"activation: the cupy_hopper backend computes 'gelu_tanh', got {activation!r}")
    indices, device = columns.indices, x.device
    x_start, w1_start, w2_start = x.data_ptr(), w1.data_ptr(), w2_by_neuron.data_ptr()
    activations, output = activation_cache.data_ptr(), output_cache.data_ptr()
    plan = _plan(
        settings, x.dtype, output_cache.dtype, device,
        x.shape, w2_by_neuron.shape[1], indices.shape, columns.group_size,
        (x_start | w1_start | w2_start) % ALIGNED_BYTES, activations % ALIGNED_BYTES, output % ALIGNED_BYTES,
        x.stride(), w1.stride(), w2_by_neuron.stride(), activation_cache.stride(), output_cache.stride(),
    )  # fmt: skip
    if plan is None:
        return
    x_map = plan.maps(x_start)
    if x_map is None:  # a batch that shares its memory
        x = x.clone(memory_format=torch.contiguous_format)
        return sparse_mlp(
            x, w1, b1, w2_by_neuron, columns, activation_cache, output_cache, activation, settings
        )
    indices, counts = indices.contiguous(), columns.counts.contiguous()  # copies must outlive the launch
    packed = plan.new_packed()
    counters = _counters(plan.counters, device)
    plan.launch(
        x_map, w1_start, 0 if b1 is None else b1.data_ptr(), w2_start,
        indices.data_ptr(), counts.data_ptr(), activations, output, packed.data_ptr(),
        counters if isinstance(counters, int) else counters.data_ptr(),
    )  # fmt: skip


def _counters(count: int, device: torch.device) -> Tensor | int:
    """Noughts, at least `count`. The kernel leaves them so: they serve all launches on a stream, one by one.

    A graph may be replayed on any stream, so it has its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    room = 1 << (count - 1).bit_length()  # few sizes, shared by all shapes
    return _own_counters(room, device, torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
def _own_counters(count: int, device: torch.device, stream: int) -> int:
    """Address of counters that are kept for the process.

    Not PyTorch's memory: what a compiled graph's trial runs allocate comes from the graph's pool, which gives
    it away once they are over, to whoever is next.
    """
    import cupy

    runtime, size = cupy.cuda.runtime, count * torch.int32.itemsize
    with torch.cuda.device(device):
        address = int(runtime.malloc(size))
        runtime.memsetAsync(address, 0, size, stream)
    return address


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _whole_chunks(strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether every row begins at a multiple of 16 bytes if the first one does."""
    return all(step * dtype.itemsize % ALIGNED_BYTES == 0 for step in strides[:-1])


def _check_readable(
    width: int, width_out: int, strides: tuple[tuple[int, ...], ...], dtype: torch.dtype, aligned: bool
) -> None:
    """Raise UnsuitableInputError unless 16-byte loads can read all rows of x and both weights."""
    whole = width % ALIGNED_ELEMENTS == 0 and width_out % ALIGNED_ELEMENTS == 0
    if aligned and whole and all(_whole_chunks(steps, dtype) for steps in strides):
        return
    raise UnsuitableInputError(
        "x, w1, w2_by_neuron: the cupy_hopper backend needs rows of whole 16 bytes (widths and "
        f"strides that are multiples of {ALIGNED_ELEMENTS}, an aligned start); got widths {width} "
        f"and {width_out}, strides {strides}; use backend='triton'"
    )


def _unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why this kernel cannot run this dtype and model width, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the cupy_hopper sparse MLP takes float16 and bfloat16; got {dtype}"
    if width % ALIGNED_ELEMENTS:
        return (
            f"the cupy_hopper sparse MLP takes widths that are multiples of {ALIGNED_ELEMENTS}; got {width}"
        )
    return None


KERNELS = (Kernel("sparse_mlp", "cupy_hopper", sparse_mlp, SparseMlpSettings, _unsupported),)

_TILES = (
    SparseMlpSettings(),
    SparseMlpSettings(width=128, stages=6),
    SparseMlpSettings(width=192),
    SparseMlpSettings(adds_in_l2=0),
    fitted(SparseMlpSettings(), WARPGROUP_TOKENS),
)
SOURCES = tuple(
    source(dtype, float_output, tiles)
    for tiles in _TILES
    for dtype in (torch.bfloat16, torch.float16)
    for float_output in (False, True)
    if tiles == _TILES[0] or (dtype == torch.bfloat16 and not float_output)
)
