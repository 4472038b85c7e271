"""The doors between the rooms: which package may import which, inside functions too.

reference          → torch
chipmunk_kernels   → torch (triton, cupy and diffusers only in the folder that is about them)
tuner              → chipmunk_kernels, reference, optuna
suites             → tuner, chipmunk_kernels, reference, diffusers
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("reference", "chipmunk_kernels", "tuner", "suites", "tests")

OURS_ALLOWED = {
    "reference": set(),
    "chipmunk_kernels": set(),
    "tuner": {"chipmunk_kernels", "reference"},
    "suites": {"chipmunk_kernels", "reference", "tuner"},
    "tests": set(PACKAGES),
}
THEIRS_ALLOWED = {
    "reference": {"torch"},
    "chipmunk_kernels": {"torch", "numpy", "yaml"},
    "tuner": {"torch", "triton", "numpy", "yaml", "optuna", "tabulate", "tqdm"},
}
"""Third-party packages by room. `suites` and `tests`, at the end of the chain, may use what is installed."""

HOMES = {
    "triton": ("chipmunk_kernels/backends/triton/", "chipmunk_kernels/backends/triton_hopper/"),
    "cupy": ("chipmunk_kernels/backends/cupy/", "chipmunk_kernels/backends/cupy_hopper/"),
    "diffusers": ("chipmunk_kernels/integrations/",),
}
"""Optional packages and the only folders of `chipmunk_kernels` that may import them."""


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in `source`, a module of the dotted `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base]).strip(".")
            # `from . import tuner` at the top would name a package in the alias, not in the module.
            yield from ((node.lineno, f"{base}.{alias.name}".strip(".")) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _is_import_call(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _is_import_call(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return function.attr == "import_module"
    return isinstance(function, ast.Name) and function.id in ("import_module", "__import__")


def violations(source: str, path: str) -> list[str]:
    """What in `source`, the text of the repository file `path`, breaks the import directions."""
    room = path.split("/")[0]
    package = ".".join(path.split("/")[:-1])
    found = []
    for line, module in imported_modules(source, package):
        top = module.split(".")[0]
        if top == room or top in sys.stdlib_module_names:
            continue
        if top in PACKAGES:
            allowed = top in OURS_ALLOWED[room]
        elif room == "chipmunk_kernels" and top in HOMES:
            allowed = path.startswith(HOMES[top])
        else:
            allowed = room not in THEIRS_ALLOWED or top in THEIRS_ALLOWED[room]
        if not allowed:
            found.append(f"{path}:{line}: {room} must not import {module}")
    return found


def sources() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    )


def test_every_file_keeps_the_import_directions() -> None:
    paths = sources()
    assert {path.split("/")[0] for path in paths} == set(PACKAGES)
    found = [line for path in paths for line in violations((ROOT / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("chipmunk_kernels/a.py", "import tuner.space"),
        ("chipmunk_kernels/a.py", "from suites import benchmarks"),
        ("chipmunk_kernels/ops/a.py", "def f():\n    from reference.attention import dense"),
        ("chipmunk_kernels/ops/a.py", "import importlib\nimportlib.import_module('tuner')"),
        ("chipmunk_kernels/ops/a.py", "def f():\n    import triton"),
        ("chipmunk_kernels/backends/triton/a.py", "import cupy"),
        ("chipmunk_kernels/backends/cupy/a.py", "import triton.language as tl"),
        ("chipmunk_kernels/delta/a.py", "def f():\n    from diffusers.models import attention"),
        ("chipmunk_kernels/delta/a.py", "import optuna"),
        ("reference/a.py", "import chipmunk_kernels"),
        ("reference/a.py", "import numpy as np"),
        ("tuner/a.py", "from suites.benchmarks import conftest"),
        ("tuner/export/a.py", "import diffusers"),
        ("suites/a.py", "from tests.factories import columns"),
    ],
)
def test_a_wrong_door_is_noticed(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("chipmunk_kernels/backends/triton/a.py", "import triton.language as tl\nfrom . import mlp"),
        ("chipmunk_kernels/backends/cupy/a.py", "def f():\n    import cupy"),
        ("chipmunk_kernels/integrations/a.py", "from diffusers import FluxPipeline"),
        ("chipmunk_kernels/ops/a.py", "import torch, math\nfrom ..columns import ColumnSet"),
        ("reference/a.py", "import torch.nn.functional as F"),
        ("tuner/a.py", "import optuna\nfrom reference import attention\nfrom chipmunk_kernels import ops"),
        ("suites/a.py", "import tuner, reference, diffusers, PIL"),
    ],
)
def test_a_right_door_is_let_through(path: str, source: str) -> None:
    assert violations(source, path) == []


WITHOUT_EXTRAS = """
import sys, time
absent = {"triton", "cupy", "diffusers", "transformers", "optuna", "tuner", "suites", "reference"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import torch
sys.meta_path.insert(0, Absent())
start = time.perf_counter()
import chipmunk_kernels
print(time.perf_counter() - start)
"""


@pytest.mark.alone
def test_the_kernels_import_alone_and_quickly() -> None:
    """With torch and nothing else installed, and within half a second beyond `import torch`."""
    command, seconds = [sys.executable, "-c", WITHOUT_EXTRAS], []
    for _ in range(4):  # another process may hold the processor: the quickest run is the cost
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
        if seconds[-1] < 0.5:
            return
    pytest.fail(f"import chipmunk_kernels took {min(seconds):.2f} s beyond torch, expected below 0.5 s")
