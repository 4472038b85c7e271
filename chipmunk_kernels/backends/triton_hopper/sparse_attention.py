"""Column-sparse attention on Hopper, in Gluon: each group of queries attends to its own scattered columns.

One partition of four warps fetches (`fetch.py`), CONSUMERS others compute (`attend.py`): the first gathers
BLOCK_N rows of k and of v at a time into tiles that wgmma reads. Programs are persistent, one on each
multiprocessor, with heads outermost, so that those in flight share one head's keys and values in the L2
cache. The fetching partition runs ahead into the next row tile, as far as the stages go, and the computing
ones bring their next queries while their last product runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.runtime.errors import PTXASError

from chipmunk_kernels.backends.triton.device import units as multiprocessors
from chipmunk_kernels.backends.triton.launch import ALMOST_ZERO, LOG2E, Launcher, on_device, signature
from chipmunk_kernels.backends.triton_hopper.attend import attend
from chipmunk_kernels.backends.triton_hopper.fetch import fetch
from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.layout import empty_like_queries, maker, strides_like_queries
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.registry import BuildError, Kernel
from chipmunk_kernels.settings import LaunchSettings, choice

WIDTHS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
ROWS = 64
"""Query rows of one warpgroup."""
VECTOR_BYTES = 16
DIVISOR = 16
"""Of every stride: what Triton goes by to take an address for aligned."""
OPTIONS = {"num_warps": 4}
SHARED_BYTES = 227 * 1024
"""Most shared memory of one program."""
REGISTERS = {1: (216, 72), 2: (216, 72), 3: (152, 48)}
"""Of a thread that computes, and of one that fetches, by computing warpgroups: what the register file has."""
WARPGROUP = gl.constexpr(128)


@dataclass(frozen=True)
class SparseAttentionSettings(LaunchSettings):
    """Tiles of the column-sparse attention kernel.

    Attributes:
        block_n: columns gathered at a time. On an H200, FLUX at 93 % was quickest with 64, videos with 128,
            which need two warpgroups or fewer.
        num_stages: tiles of keys, and of values, that are under way.
    """

    block_n: int = choice(64, 32, 64, 128)
    num_stages: int = choice(4, 2, 3, 4, 5)

    @classmethod
    def presets(cls) -> tuple[SparseAttentionSettings, ...]:
        # Five stages for three warpgroups: FLUX by 192 took an H200 68 instead of 75 us.
        return cls(128, 2), cls(64, 5)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        consumers = warpgroups(problem.group_size)
        sums = problem.width // 2 + self.block_n * 3 // 4
        if sums > REGISTERS[consumers][0] * 3 // 4:
            return f"keeps its sums in {sums} of a thread's {REGISTERS[consumers][0]} registers"
        needed = shared_bytes(problem.width, consumers, self)
        limit = SHARED_BYTES if shared_memory_bytes is None else min(SHARED_BYTES, shared_memory_bytes)
        return f"needs {needed} bytes of shared memory, the device has {limit}" if needed > limit else None


def warpgroups(group_size: int) -> int:
    """How many compute: three where they divide the group's, else two, or the one that it has."""
    needed = -(-group_size // ROWS)
    return 3 if needed % 3 == 0 else min(needed, 2)


def shared_bytes(width: int, consumers: int, settings: SparseAttentionSettings) -> int:
    """Most shared memory of a program: queries, stages of keys and of values, barriers (16 bytes each), and
    Triton's own for changes of layout (2 KiB a warpgroup) and for warps that wait for work (a byte each)."""
    rows = ROWS * consumers + 2 * settings.num_stages * settings.block_n
    return rows * width * 2 + 4 * settings.num_stages * 16 + consumers * (2048 + 4)


@gluon.jit(do_not_specialize=["heads", "rows", "groups", "capacity", "group_size", "tiles", "units"])
def sparse_attention_kernel(
    q, k, v, indices, counts, base, out, lse,
    q_b, q_h, q_n, k_b, k_h, v_b, v_h, base_b, base_h, base_n, out_b, out_h, out_n,
    heads, rows, groups, capacity, group_size, tiles, units, scale_log2, sign,
    WIDTH: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    K_N: gl.constexpr, V_N: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    """K_N and V_N are the strides of rows of k and v: constants, so that an address is one instruction."""
    half: gl.constexpr = q.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(half, [CONSUMERS, 64, WIDTH], swizzled)
    keys = gl.allocate_shared_memory(half, [STAGES, BLOCK_N, WIDTH], swizzled)
    values = gl.allocate_shared_memory(half, [STAGES, BLOCK_N, WIDTH], swizzled)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    keys_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=WARPGROUP)
        mbarrier.init(values_full.index(stage), count=WARPGROUP)
        mbarrier.init(keys_empty.index(stage), count=CONSUMERS)
        mbarrier.init(values_empty.index(stage), count=CONSUMERS)
    shape = (heads, rows, groups, group_size, tiles)
    strides = ((q_b, q_h, q_n), (base_b, base_h, base_n), (out_b, out_h, out_n))
    ring = (keys, values, keys_full, keys_empty, values_full, values_empty)
    # Where they fit, queries in registers spare shared memory a third of what is read from it. Constants
    # stand in the calls themselves: in a variable they would become values.
    if CONSUMERS == 1:
        gl.warp_specialize([
            (attend, (q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
                      0, CONSUMERS, BLOCK_N, WIDTH, STAGES, BLOCK_N < 128)),
            (fetch, (k, v, indices, counts, k_b, k_h, v_b, v_h, capacity, shape, units, ring,
                     CONSUMERS, BLOCK_N, WIDTH, STAGES, K_N, V_N)),
        ], [4], [FETCH_REGISTERS])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (attend, (q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
                      0, CONSUMERS, BLOCK_N, WIDTH, STAGES, BLOCK_N < 128)),
            (attend, (q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
                      1, CONSUMERS, BLOCK_N, WIDTH, STAGES, BLOCK_N < 128)),
            (fetch, (k, v, indices, counts, k_b, k_h, v_b, v_h, capacity, shape, units, ring,
                     CONSUMERS, BLOCK_N, WIDTH, STAGES, K_N, V_N)),
        ], [4, 4], [COMPUTE_REGISTERS, FETCH_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend, (q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
                      0, CONSUMERS, BLOCK_N, WIDTH, STAGES, False)),
            (attend, (q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
                      1, CONSUMERS, BLOCK_N, WIDTH, STAGES, False)),
            (attend, (q, counts, base, out, lse, strides, shape, units, scale_log2, sign, queries, ring,
                      2, CONSUMERS, BLOCK_N, WIDTH, STAGES, False)),
            (fetch, (k, v, indices, counts, k_b, k_h, v_b, v_h, capacity, shape, units, ring,
                     CONSUMERS, BLOCK_N, WIDTH, STAGES, K_N, V_N)),
        ], [4, 4, 4], [COMPUTE_REGISTERS, COMPUTE_REGISTERS, FETCH_REGISTERS])  # fmt: skip


_launch = Launcher(sparse_attention_kernel)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: ColumnSet,
    base: Tensor | None,
    sign: int,
    scale: float,
    settings: SparseAttentionSettings,
) -> tuple[Tensor, Tensor]:
    """out = base + sign · softmax(q K[cols]ᵀ · scale) V[cols], and the softmax's natural-log normaliser.

    Arguments and results are those of `backends.triton.sparse_attention.sparse_attention`, for heads of 64
    and 128. A base of another dtype than q's is rounded to that first; tensors whose rows do not start at
    multiples of 16 bytes are copied.

    Raises:
        BuildError: this version of Triton cannot compile the kernel.
    """
    if scale < 0:
        q, scale = -q, -scale  # the running maximum is taken before scaling
    if base is not None and base.dtype != q.dtype:
        base = base.to(q.dtype)
    indices, counts = columns.indices, columns.counts
    plan = _plan(
        settings, q.dtype, q.device, q.shape, indices.shape, columns.group_size, scale, sign,
        q.stride(), k.stride(), v.stride(), None if base is None else base.stride(),
    )  # fmt: skip
    starts = q.data_ptr() | k.data_ptr() | v.data_ptr() | (0 if base is None else base.data_ptr())
    if not plan.readable or starts % VECTOR_BYTES:
        base = None if base is None else _readable(base)
        return sparse_attention(
            _readable(q), _readable(k), _readable(v), columns, base, sign, scale, settings
        )
    out, lse = plan.new_out(), plan.new_lse()
    tensors = (q, k, v, indices.contiguous(), counts.contiguous(), base, out, lse)
    with on_device(q):
        try:
            _launch(plan.programs, tensors, plan.integers, plan.floats, plan.constants, OPTIONS)
        except (CompilationError, PTXASError, RuntimeError) as error:
            if not _is_of_the_compiler(error):
                raise
            raise BuildError(f"triton {triton.__version__}: {error}") from error
    return out, lse


@dataclass(frozen=True)
class Plan:
    """What a launch takes besides tensors.

    Attributes:
        programs: how many.
        integers, floats, constants: arguments of the kernel, in its order.
        new_out, new_lse: give tensors for the results.
        readable: whether rows are where 16-byte copies can fetch them, if the tensors start there.
    """

    programs: int
    integers: tuple[int, ...]
    floats: tuple[float, float]
    constants: dict[str, int]
    new_out: Callable[[], Tensor]
    new_lse: Callable[[], Tensor]
    readable: bool


@functools.lru_cache(maxsize=4096)
def _plan(
    settings: SparseAttentionSettings,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...],
    lists: tuple[int, ...],
    group_size: int,
    scale: float,
    sign: int,
    *strides: tuple[int, ...] | None,
) -> Plan:
    """What follows from shapes and strides (of q, k, v and base): one lookup a call."""
    assert strides[0] is not None
    batch, heads, rows, _ = shape
    _, _, groups, capacity = lists
    consumers = warpgroups(group_size)
    tiles = -(-group_size // (ROWS * consumers))
    units = batch * heads * groups * tiles
    out_strides = strides_like_queries(shape, strides[0])
    read = [(each or (0, 0, 0, 1))[:3] for each in strides]
    q_steps, k_steps, v_steps, base_steps = read
    return Plan(
        programs=min(units, multiprocessors(device)),
        integers=(
            *q_steps, *k_steps[:2], *v_steps[:2], *base_steps, *out_strides[:3],
            heads, rows, groups, capacity, group_size, tiles, units,
        ),
        floats=((scale or ALMOST_ZERO) * LOG2E, float(sign)),
        constants=constants(shape[3], group_size, k_steps[2], v_steps[2], settings),
        new_out=maker(shape, dtype, device, out_strides),
        new_lse=maker((batch, heads, rows), torch.float32, device),
        readable=not any(step % DIVISOR for steps in read for step in steps),
    )  # fmt: skip


def constants(
    width: int, group_size: int, k_n: int, v_n: int, settings: SparseAttentionSettings
) -> dict[str, int]:
    """Compile-time constants of the kernel by name, in its order."""
    consumers = warpgroups(group_size)
    compute_registers, fetch_registers = REGISTERS[consumers]
    return {
        "WIDTH": width, "CONSUMERS": consumers, "BLOCK_N": settings.block_n, "STAGES": settings.num_stages,
        "K_N": k_n, "V_N": v_n, "COMPUTE_REGISTERS": compute_registers, "FETCH_REGISTERS": fetch_registers,
    }  # fmt: skip


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether Triton could not compile. What a pass rejects is a plain RuntimeError; so is what the driver
    says of a launch, but that names CUDA."""
    of_its_own = isinstance(error, (CompilationError, PTXASError))
    return of_its_own or (type(error) is RuntimeError and "CUDA" not in str(error))


def _readable(x: Tensor) -> Tensor:
    """`x` itself if Triton can tell that its rows start at multiples of 16 bytes, else a copy like it."""
    if x.data_ptr() % VECTOR_BYTES == 0 and not any(step % DIVISOR for step in x.stride()[:3]):
        return x
    return empty_like_queries(x).copy_(x)


def _unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why this kernel cannot run this dtype and head dimension, or None."""
    if dtype not in DTYPES:
        return f"Triton's Hopper attention kernel takes float16 and bfloat16; got {dtype}"
    if width not in WIDTHS:
        return f"Triton's Hopper attention kernel takes head dimensions 64 and 128; got {width}"
    return None


KERNELS = (
    Kernel("sparse_attention", "triton_hopper", sparse_attention, SparseAttentionSettings, _unsupported),
)

_TYPES = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "indices": "*i32", "counts": "*i32",
    "base": "*bf16", "out": "*bf16", "lse": "*fp32", "scale_log2": "fp32", "sign": "fp32",
}  # fmt: skip


def compile_case(group_size: int, width: int, settings: SparseAttentionSettings) -> tuple[object, ...]:
    """A compile-only case (see `triton/resources.py`) of bfloat16 queries."""
    values = constants(width, group_size, width, width, settings)
    types = signature(sparse_attention_kernel, _TYPES, values)
    name = f"sparse_attention by {group_size}, Hopper"
    return name, sparse_attention_kernel, types, values, OPTIONS["num_warps"], settings.num_stages


COMPILE_CASES = tuple(
    compile_case(group_size, 128, SparseAttentionSettings()) for group_size in (64, 128, 192)
)
