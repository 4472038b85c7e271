"""Tensor maps: how Hopper's copy engine is told where the rows of a `(B, H, N, D)` tensor lie.

The driver encodes them on the host (128 opaque bytes each) and kernels take them by value. Encoding costs
microseconds and depends on the address alone beyond the shape, so maps are remembered: a caching allocator
hands out the same addresses again and again.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

MAP_BYTES = 128
BOX_WIDTH = 64
"""Elements of a box's rows: 128 bytes, what one swizzled row of shared memory holds."""

_ALIGNMENT = 64  # of a map in memory, which the driver checks
_KINDS = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZEROS = 0, 3, 3, 0
_STEP_BYTES = 16  # addresses and strides are multiples of it


def fits(x: Tensor) -> bool:
    """Whether a map can describe this `(B, H, N, D)` tensor: D contiguous, rows 16-byte aligned, not shared."""
    item = x.element_size()
    steps = [stride * item for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(step > 0 and step % _STEP_BYTES == 0 for step in steps)
    return aligned and x.data_ptr() % _STEP_BYTES == 0 and x.stride(3) == 1


def mappable(x: Tensor) -> Tensor:
    """The tensor itself, or a copy that a map can describe."""
    return x if fits(x) else x.clone(memory_format=torch.contiguous_format)


def rows_map(x: Tensor, rows: int, box_rows: int) -> bytes:
    """A map of `(B, H, N, D)` in boxes of `box_rows` × 64 elements; past the first `rows` it gives zeros.

    Raises:
        RuntimeError: the driver refuses; the message has its error code.
    """
    batch, heads, _, width = x.shape
    return _encode(x.data_ptr(), x.dtype, (width, rows, heads, batch), _strides(x), box_rows)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Bytes from row to row, head to head, batch to batch; where there is but one, any valid number."""
    item, width = x.element_size(), x.shape[3]
    n, h, b = ((x.stride(dim) if x.shape[dim] > 1 else width) * item for dim in (2, 1, 0))
    return n, h, b


@functools.lru_cache(maxsize=4096)
def _encode(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box_rows: int
) -> bytes:
    room = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    place = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place), ctypes.c_int(_KINDS[dtype]), ctypes.c_uint32(4), ctypes.c_void_p(address),
        (ctypes.c_uint64 * 4)(*sizes), (ctypes.c_uint64 * 3)(*strides),
        (ctypes.c_uint32 * 4)(BOX_WIDTH, box_rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        ctypes.c_int(_NO_INTERLEAVE), ctypes.c_int(_SWIZZLE_128B), ctypes.c_int(_PROMOTE_256B),
        ctypes.c_int(_FILL_ZEROS),
    )  # fmt: skip
    if status:
        raise RuntimeError(
            f"the driver refuses a tensor map (error {status}): {sizes=} {strides=} {box_rows=}"
        )
    return ctypes.string_at(place, MAP_BYTES)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
