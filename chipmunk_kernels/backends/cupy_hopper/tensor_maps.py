"""Tensor maps: how Hopper's copy engine is told where the rows of a `(B, H, N, D)` tensor lie.

The driver encodes them on the host (128 opaque bytes each) and kernels take them by value. Encoding costs
microseconds and depends on address and shape alone, so maps are remembered: a caching allocator hands out the
same addresses again and again.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from chipmunk_kernels.backends.cupy.launching import join_context

MAP_BYTES = 128
BOX_WIDTH = 64
"""Elements of a box's rows: 128 bytes, what one swizzled row of shared memory holds."""

_ALIGNMENT = 64  # of a map in memory, which the driver checks
_KINDS = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZEROS = 0, 3, 3, 0
_STEP_BYTES = 16  # addresses and strides are multiples of it
_NO_CONTEXT = 201  # what the driver answers a thread that has not used a device yet


def with_map(x: Tensor, rows: int, box_rows: int) -> tuple[Tensor, bytes]:
    """The `(B, H, N, D)` tensor and its map in boxes of `box_rows` × 64; zeros past the first `rows` rows.

    A tensor that no map can describe, since its rows are not 16-byte aligned or share memory, is copied.

    Raises:
        RuntimeError: the driver refuses; the message has its error code.
    """
    found = _map(x.data_ptr(), x.dtype, x.shape, x.stride(), rows, box_rows)
    if found is not None:
        return x, found
    return with_map(x.clone(memory_format=torch.contiguous_format), rows, box_rows)


@functools.lru_cache(maxsize=4096)
def _map(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    rows: int,
    box_rows: int,
) -> bytes | None:
    """The map, or None where there can be none. One lookup a tensor: all the checks are behind it."""
    batch, heads, _, width = shape
    # Bytes from row to row, head to head, batch to batch; where there is but one, any valid number.
    steps = [
        (step if size > 1 else width) * dtype.itemsize
        for size, step in zip(shape[2::-1], stride[2::-1], strict=True)
    ]
    aligned = address % _STEP_BYTES == 0 and all(step > 0 and step % _STEP_BYTES == 0 for step in steps)
    if not aligned or stride[3] != 1:
        return None
    return _encode(address, dtype, (width, rows, heads, batch), tuple(steps), box_rows)


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
