"""What each kernel asks of a GPU, found by compiling it for that GPU on a machine that has none.

    python -m chipmunk_kernels.backends.triton.resources [--targets sm_80 sm_90 …] [--kernels NAME …] [--json]

Every kernel file lists `COMPILE_CASES`: tuples of (name, jit function, signature, constexprs, num_warps,
num_stages), with the default settings at a real model's shapes. A signature maps arguments to types; pointers
count as aligned to 16 bytes and numbers typed `i32:16` as divisible by 16, as Triton finds them at a launch.
Kernels in Gluon (`backends/triton_hopper`) are compiled for sm_90 only.
Registers, stack and shared memory are read from the compiled binary with the `cuobjdump` that Triton ships.
Compiled kernels are cached where TRITON_CACHE_DIR says.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chipmunk_kernels.backends import triton as portable
from chipmunk_kernels.backends import triton_hopper
from chipmunk_kernels.backends.triton import interpreted

SHARED_MEMORY_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
}
"""Most shared memory one program may have, by compute capability (CUDA C++ programming guide, table 30)."""


@dataclass(frozen=True)
class Resources:
    """What one kernel uses on one target.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread; these kernels have no local arrays, so it is what registers spilled to.
        shared_bytes: of a program; `shared_limit_bytes` is what the target has, 0 where that is not known.
        compile_seconds: near zero if it came from Triton's cache.
        error: why it did not compile, or None; the numbers are 0 then.
    """

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    shared_limit_bytes: int = 0
    compile_seconds: float = 0.0
    error: str | None = None


def cuobjdump() -> str:
    """Path of the cuobjdump that Triton ships, else of one on PATH.

    Raises:
        RuntimeError: there is neither.
    """
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(shipped) if shipped.is_file() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError(
            f"cuobjdump is neither at {shipped} nor on PATH; reinstall triton, or install the CUDA toolkit"
        )
    return found


def cases() -> Iterator[tuple[Any, ...]]:
    """The compile cases of every kernel file."""
    for package in (portable, triton_hopper):
        if package is triton_hopper and triton_hopper.without_gluon() is not None:
            continue
        for file in package.FILES:
            declared = importlib.import_module(f"{package.__name__}.{file}").COMPILE_CASES
            yield from declared() if callable(declared) else declared


def suits(case: tuple[Any, ...], target: str) -> bool:
    """Whether a case is to be compiled for a target: one in Gluon is written in Hopper's instructions."""
    return target == "sm_90" or not _in_gluon(case[1])


def measure(case: tuple[Any, ...], target: str) -> Resources:
    """Compile one case for a target such as "sm_90" and read what it uses; a failure is recorded."""
    name, kernel, signature, constexprs, num_warps, num_stages = case
    capability = int(target.removeprefix("sm_"))
    row = Resources(
        name, target, num_warps, num_stages, shared_limit_bytes=SHARED_MEMORY_BYTES.get(capability, 0)
    )
    start = time.perf_counter()
    try:
        binary = _compile(kernel, signature, constexprs, capability, num_warps, num_stages)
        registers, stack = _usage(binary.asm["cubin"])
    except Exception as error:  # one kernel that does not compile must not hide the others
        return dataclasses.replace(row, error=f"{type(error).__name__}: {error}")
    return dataclasses.replace(
        row,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=binary.metadata.shared,
        compile_seconds=round(time.perf_counter() - start, 2),
    )


def _compile(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    types = {
        name: "constexpr" if name in constexprs else signature[name].removesuffix(":16")
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or signature.get(name, "").endswith(":16")
    }
    if _in_gluon(kernel):
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    source = Source(kernel, types, dict(constexprs), aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _in_gluon(kernel: Any) -> bool:
    return hasattr(kernel, "is_gluon") and kernel.is_gluon()


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread of the one kernel in a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return int(found.group(1)), int(found.group(2))


def table(rows: Sequence[Resources]) -> str:
    """The rows as an aligned text table."""
    lines = [f"{'kernel':<28} {'target':<7} warps stages registers  stack {'shared bytes':>15}"]
    for row in rows:
        shared = f"{row.shared_bytes}/{row.shared_limit_bytes or '?'}"
        used = f"{row.registers:>9} {row.stack_bytes:>6} {shared:>15}"
        launch = f"{row.kernel:<28} {row.target:<7} {row.num_warps:>5} {row.num_stages:>6}"
        lines.append(f"{launch} {f'failed: {row.error}' if row.error else used}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the kernels asked for and print what each uses; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel and report what it uses.")
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "sm_100"], metavar="sm_NN")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only cases whose names start so")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args(arguments)
    wrong = [target for target in options.targets if not re.fullmatch(r"sm_\d+", target)]
    if wrong:
        parser.error(f"--targets: expected names such as sm_90, got {' '.join(wrong)}")
    if interpreted():
        parser.error("TRITON_INTERPRET is set, so that kernels are not compiled; unset it")
    wanted = tuple(options.kernels or ("",))
    chosen = [case for case in cases() if case[0].startswith(wanted)]
    if not chosen:
        parser.error(f"--kernels: none starts so; there are {' '.join(case[0] for case in cases())}")
    rows = [measure(case, target) for case in chosen for target in options.targets if suits(case, target)]
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if options.json else table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
