"""Carry a pipeline folder as a few files: one uncompressed tar, cut into parts of at most 15 MiB."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

PART_BYTES = 15 * 2**20
NAME = "flux-shapes"


def write_parts(folder: Path, out: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write `folder` as `out/flux-shapes.tar.part0`, `.part1` …; older parts go once all are written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, arcname=f"{NAME}/{path.relative_to(folder)}", recursive=False)
    data = buffer.getbuffer()
    fresh: list[tuple[Path, Path]] = []
    for index, start in enumerate(range(0, len(data), part_bytes)):
        part = out / f"{NAME}.tar.part{index}"
        temporary = out / f"{part.name}.new"
        temporary.write_bytes(data[start : start + part_bytes])
        fresh.append((temporary, part))
    for temporary, part in fresh:
        os.replace(temporary, part)
    return [part for _, part in fresh]


def read_parts(source: Path, folder: Path) -> None:
    """Unpack the parts in the directory `source` into `folder`, replacing the files it holds.

    Raises FileNotFoundError when `source` holds no parts.
    """
    parts = sorted(source.glob(f"{NAME}.tar.part*"), key=lambda p: int(p.name.rsplit("part", 1)[1]))
    if not parts:
        raise FileNotFoundError(f"no {NAME}.tar.part* in {source}; train writes them there (--out)")
    data = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=data) as tar:
        for member in tar.getmembers():
            inner = Path(member.name).relative_to(NAME)
            if member.isdir():
                (folder / inner).mkdir(parents=True, exist_ok=True)
            elif (stream := tar.extractfile(member)) is not None:
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                with stream, open(folder / inner, "wb") as file:
                    shutil.copyfileobj(stream, file)
