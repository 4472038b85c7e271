"""What an exporter hands back: texts to write, and what the target could not be told."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


class ExportError(ValueError):
    """Nothing can be exported; the message says why and what to do."""


@dataclass(frozen=True)
class Export:
    """One export, not yet written.

    Attributes:
        files: file name → its whole text.
        warnings: what the target cannot express, one sentence each, the key named first.
    """

    files: dict[str, str]
    warnings: tuple[str, ...] = ()

    def write(self, folder: Path) -> list[Path]:
        """Write every file into `folder`, each whole or not at all. Returns the paths.

        Raises:
            ExportError: the folder cannot be made or written to; files that were there are untouched.
        """
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in self.files.items():
                path = folder / name
                _replace(path, text)
                written.append(path)
        except OSError as error:
            raise ExportError(f"{folder}: cannot be written ({error}); choose another --output") from error
        return written


def _replace(path: Path, text: str) -> None:
    """An interrupted write leaves the old file: the new text gets its place only when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
