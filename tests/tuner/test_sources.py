"""Which edits outdate which kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from chipmunk_kernels import registry
from tuner import sources


def names(operation: str) -> set[str]:
    module = registry.kernel(operation, "torch").settings.__module__
    return {path.name for path in sources._files(module)}


def test_a_kernel_is_its_module_and_the_backend_modules_it_imports() -> None:
    assert "attention.py" in names("sparse_attention")
    assert "mlp.py" not in names("sparse_attention")
    assert "mlp.py" in names("sparse_mlp")


def test_an_edit_changes_the_hash_of_what_it_touches_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [registry.kernel(operation, "torch") for operation in ("sparse_attention", "sparse_mlp")]
    before = [sources.kernel_hash(kernel) for kernel in kernels]
    copy = tmp_path / "mlp.py"
    mlp = sources._path(kernels[1].settings.__module__)
    assert mlp is not None
    copy.write_text(mlp.read_text() + "\n# edited\n")
    path = sources._path
    monkeypatch.setattr(sources, "_path", lambda name: copy if path(name) == mlp else path(name))
    sources._module_hash.cache_clear()
    try:
        after = [sources.kernel_hash(kernel) for kernel in kernels]
    finally:
        sources._module_hash.cache_clear()
    assert after[0] == before[0] and after[1] != before[1]
    assert len(after[1]) == 12


def test_hashes_repeat_and_cover_all_kernels() -> None:
    kernels = [registry.kernel(operation, "torch") for operation in ("sparse_attention", "sparse_mlp")]
    assert sources.kernels_hash(kernels) == sources.kernels_hash(kernels)
    assert sources.kernels_hash(kernels) != sources.kernels_hash(kernels[:1])
    assert sources.all_sources_hash() == sources.all_sources_hash()
