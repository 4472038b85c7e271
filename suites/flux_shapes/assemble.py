"""Install a trained model: `python -m suites.flux_shapes.assemble SOURCE [--to FOLDER]`.

SOURCE is what `train --out` wrote (archive parts) or a pipeline folder. The model is checked in a temporary
folder first, so a broken or too large one replaces nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "models" / "flux-shapes"
KEPT = "README.md"
"""The model card: written by hand, so it is kept."""


def assemble(source: Path, folder: Path) -> int:
    """Put the model in `source` into `folder`, which keeps its model card; returns the model's bytes.

    Raises FileNotFoundError if `source` holds no model, ValueError if the model is larger than `MOST_BYTES`,
    has weights that are not finite, or does not load offline as a `FluxPipeline`.
    """
    from suites.flux_shapes.archive import read_parts

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        fresh = Path(parent) / folder.name
        if (source / "model_index.json").exists():
            shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(KEPT))
        else:
            read_parts(source, fresh)
        size = verify(fresh)
        if (folder / KEPT).exists():
            shutil.copy2(folder / KEPT, fresh / KEPT)
        if folder.exists():
            folder.rename(Path(parent) / "old")
        fresh.rename(folder)
    return size


def verify(folder: Path) -> int:
    """Bytes of the model in `folder`; raises ValueError when it is too large or no usable `FluxPipeline`."""
    from diffusers import FluxPipeline

    from suites.flux_shapes.folder import MOST_BYTES, folder_bytes

    size = folder_bytes(folder)
    if size > MOST_BYTES:
        raise ValueError(f"model: expected at most {MOST_BYTES / 1e6:.0f} MB, got {size / 1e6:.1f} MB")
    try:
        pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"model: expected a folder that FluxPipeline loads, got {error!r}") from error
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        if not all(p.isfinite().all() for p in getattr(pipe, name).parameters()):
            raise ValueError(f"model: expected finite weights, got others in {name}")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m suites.flux_shapes.assemble", description="Install a trained flux-shapes model."
    )
    parser.add_argument("source", type=Path, help="directory that train wrote, or a pipeline folder")
    parser.add_argument("--to", type=Path, default=SHIPPED, help="folder to install into (default: shipped)")
    options = parser.parse_args(argv)
    try:
        size = assemble(options.source, options.to)
    except (FileNotFoundError, ValueError) as error:
        print(f"{error}; nothing was replaced", file=sys.stderr)
        return 1
    print(f"{options.to}: {size / 1e6:.1f} MB, loads as FluxPipeline")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
