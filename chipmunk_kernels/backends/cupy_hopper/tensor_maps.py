"""Tensor maps: how Hopper's copy engine is told where the rows of a `(B, H, N, D)` tensor lie.

The driver encodes them on the host (128 opaque bytes each) and kernels take them by value. Encoding costs
microseconds and depends on address and layout alone, so maps are remembered: a caching allocator hands out
the same addresses again and again. A launch plan knows the layouts, and looks up by the addresses alone.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.launching import join_context
from chipmunk_kernels.layout import empty_like_queries

MAP_BYTES = 128
BOX_WIDTH = 64
"""Elements of a box's rows: 128 bytes, what one swizzled row of shared memory holds."""

_ALIGNMENT = 64  # of a map in memory, which the driver checks
_KINDS = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZEROS = 0, 3, 3, 0
_STEP_BYTES = 16  # addresses and strides are multiples of it
_NO_CONTEXT = 201  # what the driver answers a thread that has not used a device yet


@dataclass(frozen=True)
class Layout:
    """What a map says of a `(B, H, N, D)` tensor besides its address.

    Attributes:
        dtype, shape, strides: of the tensor.
        rows: that can be read; zeros come past them.
        box_rows: the map's boxes are `box_rows` × 64.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    rows: int
    box_rows: int


def maps_of(*layouts: Layout | None) -> Callable[..., bytes | None]:
    """A function from addresses of tensors so laid out to their maps, one after the other; it remembers.

    It gives None if no map can describe one of them: rows are not 16-byte aligned, or share memory. Then
    `mappable` copies. A layout may be None if nothing will read that tensor: a map of nothing does not exist,
    so the first one's is there instead.

    Raises:
        RuntimeError: (the function) the driver refuses; the message has its error code.
    """

    @functools.lru_cache(maxsize=256)
    def maps(*addresses: int) -> bytes | None:
        found = b""
        for address, layout in zip(addresses, layouts, strict=True):
            one = found[:MAP_BYTES] if layout is None else _map(address, layout)
            if one is None:
                return None
            found += one
        return found

    return maps


def mappable(x: Tensor) -> Tensor:
    """`x`, or where no map can describe it, a copy of it in the same order of rows and heads."""
    if x.data_ptr() % _STEP_BYTES == 0 and _steps(x.dtype, x.shape, x.stride()) is not None:
        return x
    return empty_like_queries(x).copy_(x)


@functools.lru_cache(maxsize=4096)
def _map(address: int, layout: Layout) -> bytes | None:
    """One map, or None where there can be none."""
    steps = _steps(layout.dtype, layout.shape, layout.strides)
    if steps is None or address % _STEP_BYTES:
        return None
    batch, heads, _, width = layout.shape
    return _encode(address, layout.dtype, (width, layout.rows, heads, batch), steps, layout.box_rows)


def _steps(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Bytes from row to row, head to head, batch to batch; where there is but one, any valid number.

    None where a map cannot have them.
    """
    steps = tuple(
        (step if size > 1 else shape[3]) * dtype.itemsize
        for size, step in zip(shape[2::-1], strides[2::-1], strict=True)
    )
    valid = strides[3] == 1 and all(step > 0 and step % _STEP_BYTES == 0 for step in steps)
    return steps if valid else None


def _encode(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box_rows: int
) -> bytes:
    room = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    place = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    encode = functools.partial(
        _driver().cuTensorMapEncodeTiled,
        ctypes.c_void_p(place), ctypes.c_int(_KINDS[dtype]), ctypes.c_uint32(4), ctypes.c_void_p(address),
        (ctypes.c_uint64 * 4)(*sizes), (ctypes.c_uint64 * 3)(*strides),
        (ctypes.c_uint32 * 4)(BOX_WIDTH, box_rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        ctypes.c_int(_NO_INTERLEAVE), ctypes.c_int(_SWIZZLE_128B), ctypes.c_int(_PROMOTE_256B),
        ctypes.c_int(_FILL_ZEROS),
    )  # fmt: skip
    status = encode()
    if status == _NO_CONTEXT:
        join_context()
        status = encode()
    if status:
        raise RuntimeError(
            f"the driver refuses a tensor map (error {status}): {sizes=} {strides=} {box_rows=}"
        )
    return ctypes.string_at(place, MAP_BYTES)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
