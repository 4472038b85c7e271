"""Which source files a kernel is made of, and their hash: editing one kernel must not outdate the others."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import chipmunk_kernels.backends
from chipmunk_kernels.registry import Kernel

_PACKAGE = "chipmunk_kernels.backends"


def kernel_hash(kernel: Kernel) -> str:
    """Twelve hex digits over the module of a kernel's settings and every backend module that it imports."""
    return _module_hash(kernel.settings.__module__)


def kernels_hash(kernels: Iterable[Kernel]) -> str:
    """Twelve hex digits over the sources and the declared settings of several kernels."""
    parts = [f"{kernel.backend} {kernel_hash(kernel)} {kernel.settings.space()}" for kernel in kernels]
    return hashlib.sha256("; ".join(parts).encode()).hexdigest()[:12]


def all_sources_hash() -> str:
    """Twelve hex digits over every file of every backend."""
    root = Path(chipmunk_kernels.backends.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _module_hash(module: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(_files(module)):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _files(module: str) -> set[Path]:
    """The module's file, the backend modules it imports, the CUDA source of the same name and its headers."""
    pending, seen, found = [module], set(), set()
    while pending:
        name = pending.pop()
        path = _path(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        found.add(path)
        cuda = path.with_suffix(".cu")
        if cuda.is_file():
            found.update((cuda, *path.parent.glob("*.cuh")))
        pending += [imported for imported in _imports(path) if imported.startswith(_PACKAGE + ".")]
    return found


def _path(module: str) -> Path | None:
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            return None
        file = spec.origin if spec else None
    return Path(file) if file and Path(file).is_file() else None


def _imports(path: Path) -> list[str]:
    """Absolute names in a file's imports; `from package import name` may mean a module or a name in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
