"""What the Triton attention launches share: device, supported types, and tiles that fit their rows."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from chipmunk_kernels.backends.triton import interpreted
from chipmunk_kernels.problem import Problem

ASYNCHRONOUS = (9, 10)  # major capabilities whose products read shared memory, beside other instructions
LOG2E = 1.4426950408889634
WIDTHS = (16, 32, 64, 128)
ALMOST_ZERO = 1e-30  # instead of a scale of 0, under which the −∞ of a slot that is no column would be NaN
SMALLEST_TILE = 16  # rows of one tensor-core instruction
MOST_REGISTERS = 255  # that a thread can have
ALIGNMENT = 16  # bytes; Triton compiles another binary for pointers that are not multiples of it
_ELSEWHERE = nullcontext()
BINARIES_TAKE_ALL_ARGUMENTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
"""Whether a binary is launched with every argument of its kernel, constants included.

So it is in the versions that were read (3.6, 3.7); 3.2 left constants out. Elsewhere Triton does each launch.
"""


class Launcher:
    """Launches one kernel, and remembers which binary Triton chose for arguments alike.

    Triton looks at every argument of every launch to find the binary that fits, which for the 30 arguments of
    an attention kernel takes most of the launch's host time. Here one dictionary finds it, by everything that
    the choice may depend on. Pointers that are not aligned, which is rare, are left to Triton each time; so
    is everything in a version whose binaries take other arguments.

    Attributes:
        kernel: the jit function: tensors come first among its arguments, then integers, then floats, then
            compile-time constants.
        known: binaries by device, dtypes, integers, constants and options.
        limit: how many to remember before starting over: shapes are few, but nothing says so.
    """

    limit = 4096

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.known: dict[Hashable, Any] = {}

    def __call__(
        self,
        programs: int,
        tensors: Sequence[Tensor | None],
        integers: tuple[int, ...],
        floats: Sequence[float],
        constants: Mapping[str, Hashable],
        options: Mapping[str, Hashable],
    ) -> None:
        """Launch `programs` programs on the current device's current stream.

        Args:
            tensors, integers, floats: arguments, in the kernel's order.
            constants: compile-time constants by name, in the kernel's order.
            options: Triton's, such as num_warps.
        """
        addresses = 0
        kinds: list[torch.dtype | None] = []
        for x in tensors:
            kinds.append(None if x is None else x.dtype)
            addresses |= 0 if x is None else x.data_ptr()
        first = tensors[0]
        assert first is not None
        key = (first.device, *kinds, *integers, *constants.values(), *options.values())
        direct = BINARIES_TAKE_ALL_ARGUMENTS and addresses % ALIGNMENT == 0
        grid = (programs, 1, 1)
        binary = self.known.get(key) if direct else None
        if binary is not None:
            binary[grid](*tensors, *integers, *floats, *constants.values())
            return
        binary = self.kernel[grid](*tensors, *integers, *floats, **constants, **options)
        if direct and binary is not None:  # the interpreter has none
            if len(self.known) >= self.limit:
                self.known.clear()
            self.known[key] = binary


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` current: Triton launches on the current device's current stream.

    Switching costs microseconds, so it is left out where there is nothing to switch.
    """
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _ELSEWHERE
    return torch.cuda.device(x.device)


def unsupported_attention(dtype: torch.dtype, width: int) -> str | None:
    """Why the attention kernels cannot run this dtype and head dimension, or None."""
    if width not in WIDTHS:
        return f"triton attention takes head dimensions {', '.join(map(str, WIDTHS))}; got {width}"
    if dtype in (torch.float16, torch.bfloat16):
        return None
    if dtype == torch.float32:
        # Exact float32 products have no tensor-core path: tiles of this size would spill on a real GPU.
        return None if interpreted() else "triton attention takes float16 and bfloat16 on a GPU; got float32"
    return f"triton attention takes float16 and bfloat16; got {dtype}"


def tile_rows(block_m: int, rows: int) -> int:
    """`block_m`, or the smallest power of two that covers `rows` where that is less."""
    return min(block_m, max(SMALLEST_TILE, 1 << (rows - 1).bit_length()))


def tile_warps(num_warps: int, block_m: int) -> int:
    """`num_warps`, or fewer where a warp would own less than one tensor-core instruction's 16 rows."""
    return min(num_warps, max(1, block_m // SMALLEST_TILE))


@functools.cache
def _capability(device: torch.device) -> int:
    """Major compute capability; Hopper's where the interpreter stands in for a GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def register_cap(max_registers: int, device: torch.device | None = None) -> int | None:
    """Triton's `maxnreg`: None leaves the choice to the compiler.

    With a `device`, the cap is for those alone whose products read shared memory (Hopper, data-centre
    Blackwell). Elsewhere operands pass through registers too, and a cap that lets a second program in makes
    both spill: 304 bytes a thread on sm_80 with 128×64 tiles, 8 warps and 128 registers.
    """
    return (max_registers or None) if device is None or _capability(device) in ASYNCHRONOUS else None


def sums_misfit(
    block_m: int, block_n: int, width: int, num_warps: int, max_registers: int, overlap: bool
) -> str | None:
    """Why a tile's sums leave a thread too few registers, or None if they fit.

    Output and logits accumulate in registers, where weights that wait take half a register each; addresses
    and softmax need an eighth of all registers at the least.
    """
    waiting = block_n // 2 if overlap else 0
    sums = block_m * (width + block_n + waiting) // (num_warps * 32)
    registers = max_registers or MOST_REGISTERS
    return (
        f"keeps its sums in {sums} of a thread's {registers} registers" if sums > registers * 7 // 8 else None
    )


def overlaps(
    overlap: bool,
    block_m: int,
    block_n: int,
    width: int,
    num_warps: int,
    max_registers: int,
    device: torch.device,
) -> bool:
    """Whether a launch runs a product one tile late: where products run asynchronously, and nothing spills.

    The tuner drops settings whose waiting weights would spill, but a caller may ask for them; 4 warps with
    128×64 tiles spilled 624 bytes a thread, which took an H200 seven times as long as the natural order.
    """
    fits = sums_misfit(block_m, block_n, width, num_warps, max_registers, True) is None
    return overlap and fits and _capability(device) in ASYNCHRONOUS


def precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for products of this dtype: exact for float32, of no effect on halves."""
    return "ieee" if dtype == torch.float32 else "tf32"


def key_limits(key_length: int | Tensor | None, keys: int) -> tuple[int, Tensor | None]:
    """How many of `keys` take part, and the tensor that says less for each batch, if one was given."""
    if isinstance(key_length, Tensor):
        return keys, key_length.contiguous()
    return (keys if key_length is None else max(0, min(key_length, keys))), None


def attention_misfit(
    problem: Problem,
    shared_rows: int,
    block_m: int,
    block_n: int,
    num_warps: int,
    max_registers: int,
    buffers: int,
    overlap: bool,
    shared_memory_bytes: int | None,
) -> str | None:
    """Why a tile of attention cannot run, or cannot be worth trying; None if it may be.

    At most `shared_rows` queries share a tile. Shared memory holds `buffers` tiles of keys and as many of
    values; the query tile besides, but not before sm_90, so it is left out here: what is dropped cannot run.
    """
    if tile_rows(block_m, shared_rows) != block_m:
        return f"block_m {block_m} is taller than the {shared_rows} rows that share a tile"
    if tile_warps(num_warps, block_m) != num_warps:
        return f"{num_warps} warps leave less than 16 of {block_m} rows to a warp"
    item = getattr(torch, problem.dtype).itemsize
    needed = item * problem.width * 2 * buffers * block_n
    if shared_memory_bytes is not None and needed > shared_memory_bytes:
        return f"needs {needed} bytes of shared memory or more, the device has {shared_memory_bytes}"
    return sums_misfit(block_m, block_n, problem.width, num_warps, max_registers, overlap)


def signature(kernel: Any, types: Mapping[str, str], constexprs: Mapping[str, Any]) -> dict[str, str]:
    """Argument types of a compile-only case (see resources.py), in the order of the kernel's arguments.

    Those given; "constexpr" for compile-time constants; an int32 divisible by 16 for strides (`q_n`), since
    real ones are; any int32 for the rest.
    """

    def kind(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        return types.get(name, "i32:16" if name[-2:] in ("_b", "_h", "_n") else "i32")

    return {name: kind(name) for name in kernel.arg_names}
