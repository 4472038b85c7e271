"""The JSON record of a run: written after every prompt, so nothing finished is lost; read again to resume."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from suites.end_to_end.errors import UsageError

SCHEMA = 1
NAME = "record.json"


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: tuples become lists, infinities and NaN become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` in one step: an interrupted write leaves the previous file whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that the figures belong to."""
    facts: dict[str, Any] = {
        "host": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["arch"] = f"sm_{properties.major}{properties.minor}"
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Versions of everything that decides speed or pictures."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "diffusers", "transformers", "chipmunk-kernels"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def require_writable(folder: Path) -> None:
    """Raise UsageError where `folder` could not be made or written. Makes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "read-only" if nearest.is_dir() else f"{nearest} is a file"
        raise UsageError(f"--output {folder}: cannot write there ({reason}); give another folder")


class Record:
    """A run's record in its output folder.

    A run is named by its settings (model, policy, steps, size, …): the same settings continue the record,
    other settings refuse to overwrite it.

    Raises:
        UsageError: the folder cannot be written, or holds another run and `fresh` is not set.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = folder / NAME
        settings = plain(settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UsageError(
                f"--output {folder}: cannot write there ({error.strerror or error}); give another folder"
            ) from error
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": settings,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "prompts": [],
        }
        if fresh or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text())
            stored, prompts = found["settings"], found["prompts"]
            schema = found["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path}: not readable as a record ({error}); move it away or give --fresh"
            ) from error
        if schema != SCHEMA:
            raise UsageError(
                f"{self.path}: schema {schema}, this program writes {SCHEMA}; give another --output"
            )
        if stored != settings:
            changed = sorted(k for k in {*stored, *settings} if stored.get(k) != settings.get(k))
            shown = ", ".join(
                f"{key} (there {stored.get(key)!r}, now {settings.get(key)!r})" for key in changed
            )
            raise UsageError(
                f"{self.path}: holds a run with other settings: {shown}; give another --output, or "
                "--fresh to redo it"
            )
        self.data = found
        self.data["prompts"] = prompts

    def finished(self, prompt: str) -> bool:
        return any(row["prompt"] == prompt for row in self.data["prompts"])

    def rows(self, prompts: list[str]) -> list[dict[str, Any]]:
        """The finished rows among `prompts`, in their order."""
        by_prompt = {row["prompt"]: row for row in self.data["prompts"]}
        return [by_prompt[prompt] for prompt in prompts if prompt in by_prompt]

    def add(self, row: dict[str, Any]) -> None:
        self.data["prompts"].append(row)
        self.save()

    def save(self) -> None:
        text = json.dumps(plain(self.data), indent=1, allow_nan=False) + "\n"
        try:
            write_atomically(self.path, text.encode())
        except OSError as error:
            raise UsageError(f"{self.path}: could not be written ({error.strerror or error})") from error
