"""The device that is tuned for: what it is called, what it has, how fast it was measured to be, and with
what.

`--gpu` takes `auto`, `cpu`, a CUDA device (`cuda:1`) or a GPU's usual short name (`h100`), which is looked
for among the devices of this machine.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chipmunk_kernels.backends.torch.products import product_dtype
from chipmunk_kernels.profiles import device_identity
from tuner.workload import unknown

ALIASES = {
    "b300": r"\bB300\b",
    "b200": r"\bB200\b",
    "gb200": r"\bGB200\b",
    "gh200": r"\bGH200\b",
    "h200": r"\bH200\b",
    "h100": r"\bH100\b",
    "h800": r"\bH800\b",
    "h20": r"\bH20\b",
    "a100": r"\bA100\b",
    "a800": r"\bA800\b",
    "a10": r"\bA10G?\b",
    "l40s": r"\bL40S\b",
    "l40": r"\bL40\b",
    "l4": r"\bL4\b",
    "5090": r"\bRTX 5090\b",
    "4090": r"\bRTX 4090\b",
    "3090": r"\bRTX 3090\b",
}
"""Short name → what the driver's name of the device matches."""


class HardwareError(ValueError):
    """A device that this machine has not; the message says what it has and what to do."""


@dataclass(frozen=True)
class Hardware:
    """A device's facts.

    Attributes:
        name: as the driver, or the processor, calls it.
        kind: `cuda` or `cpu`.
        arch: `sm_90`, `x86_64`.
        memory_gib: device memory, or the machine's.
        cache_bytes: L2 of a GPU, last-level cache of a CPU: what a cold sample must evict.
        units: streaming multiprocessors, or processor cores.
        shared_memory_bytes: what one block may use; None on a CPU.
    """

    name: str
    kind: str
    arch: str
    memory_gib: float
    cache_bytes: int
    units: int
    shared_memory_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to reach at best: a copy's bandwidth, and a matrix product in each
    dtype."""

    bandwidth_gbs: float
    peak_tflops: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve_device(gpu: str) -> torch.device:
    """The torch device that a `--gpu` argument means. `auto` is the first CUDA device, else the CPU.

    Raises:
        HardwareError: this machine has no such device, or the name is unknown.
    """
    wanted = gpu.strip().lower()
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    present = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if wanted in ("auto", "cuda"):
        return torch.device(_require("cuda:0", 0, present))
    numbered = re.fullmatch(r"(?:cuda:)?(\d{1,2})", wanted)
    if numbered and wanted not in ALIASES:
        index = int(numbered.group(1))
        return torch.device(_require(f"cuda:{index}", index, present))
    pattern = ALIASES.get(wanted)
    if pattern is None:
        pattern = re.escape(gpu.strip()) if any(wanted in name.lower() for name in present) else None
    if pattern is None:
        raise HardwareError(unknown("GPU", gpu, ["auto", "cpu", "cuda:0", *ALIASES]))
    for index, name in enumerate(present):
        if re.search(pattern, name, re.IGNORECASE):
            return torch.device(f"cuda:{index}")
    raise HardwareError(f"--gpu {gpu}: this machine has none. {_found(present)} {_REMEDY}")


_REMEDY = (
    "Run the same command on a machine that has one, or tune for what is here with --gpu auto; "
    "a profile tuned elsewhere is used from CHIPMUNK_PROFILE or results/tuned/."
)


def _require(device: str, index: int, present: list[str]) -> str:
    if index >= len(present):
        raise HardwareError(f"--gpu {device}: this machine has none. {_found(present)} {_REMEDY}")
    return device


def _found(present: list[str]) -> str:
    """What this machine has instead, and why torch may see less than there is."""
    cpu = device_identity("cpu")["name"]
    if present:
        return f"Found: {', '.join(present)}; and the CPU, {cpu}."
    built = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return f"Found: no CUDA device (torch {torch.__version__}, {built}); the CPU is {cpu}."


def detect(device: torch.device) -> Hardware:
    """The facts of a device of this machine."""
    identity = device_identity(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Hardware(
            **identity,
            memory_gib=round(properties.total_memory / 2**30, 1),
            cache_bytes=int(getattr(properties, "L2_cache_size", 0)) or 64 << 20,
            units=properties.multi_processor_count,
            shared_memory_bytes=int(getattr(properties, "shared_memory_per_block_optin", 0)) or None,
        )
    return Hardware(
        **identity,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        cache_bytes=_cpu_cache_bytes(),
        units=os.cpu_count() or 1,
    )


def native_dtype(device: torch.device) -> str:
    """bfloat16, unless a CPU has no instructions for it: emulated, it is slower than float32."""
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if not any(getattr(torch.cpu, check, bool)() for check in checks):
            return "float32"
    return "bfloat16"


def _cpu_cache_bytes() -> int:
    """The last-level cache as the kernel reports it, 32 MiB where it does not."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0)
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[:-1].isdigit()
    ]
    return max(sizes, default=32 << 20)


def toolchain() -> dict[str, str]:
    """Versions that decide what a kernel compiles to. Timings under two toolchains never mix."""
    return {
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cupy": next(
            (v for v in map(_version, ("cupy-cuda13x", "cupy-cuda12x", "cupy")) if v != "none"), "none"
        ),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def measure_ceilings(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """Best of several copies and matrix products: 0.1 s on a GPU, about a second on a small CPU.

    `dtypes` names those that matter. What a CPU has no instructions for is multiplied in float32.
    """
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    peaks = {}
    for dtype in sorted(set(dtypes)):
        multiplied = product_dtype(getattr(torch, dtype), device.type)
        a, b = (torch.randn(side, side, device=device).to(multiplied) for _ in range(2))
        seconds = _best_seconds(functools.partial(torch.mm, a, b), device, 10 if cuda else 4)
        peaks[dtype] = 2 * side**3 / seconds / 1e12
    source = torch.empty((1 << 30) if cuda else (1 << 27), dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = _best_seconds(functools.partial(target.copy_, source), device, 10 if cuda else 4)
    return Ceilings(2 * source.nbytes / seconds / 1e9, peaks)


def _best_seconds(function: Any, device: torch.device, repeats: int) -> float:
    function()
    best = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
