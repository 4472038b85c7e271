"""What a run is about: a pipeline, how to call it, and how to look at what it returns."""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from suites.end_to_end.errors import UsageError

GIB = 2**30


@dataclass
class Subject:
    """A pipeline ready to run.

    Attributes:
        pipe: the diffusers pipeline, on its device.
        name: what the record calls the model.
        trained: False for random weights, whose speed is real and whose pictures mean nothing.
        inputs: (prompt, seed) → the call's arguments besides steps, generator and callback.
        warm_inputs: the same for a warm-up; smaller where a full-size step takes most of a minute.
        array: pipeline output → float array `(H, W, C)`, or `(F, H, W, C)` for a video.
        value_range: span of the array's values for PSNR and SSIM; None for latents, which have no fixed one.
        dense: context in which the pipeline runs its dense baseline.
        dense_note: what that baseline is.
        parts_in_run: the dense step that is taken apart is the timed run's step 0, not one of the warm-up.
    """

    pipe: Any
    name: str
    trained: bool
    inputs: Callable[[str, int], dict[str, Any]]
    warm_inputs: Callable[[str, int], dict[str, Any]]
    array: Callable[[Any], NDArray]
    value_range: float | None
    dense_note: str
    dense: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    parts_in_run: bool = False

    @property
    def layers(self) -> int:
        transformer = self.pipe.transformer
        return len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)


def load_pipeline(model: str, kind: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of diffusers class `kind` from a folder or a hub id. Raises UsageError."""
    import diffusers

    folder = Path(model).expanduser()
    index = folder / "model_index.json"
    if folder.exists():
        if not index.is_file():
            raise UsageError(f"--model {model}: no model_index.json there; expected the folder of a {kind}")
        try:
            found = json.loads(index.read_text()).get("_class_name")
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {model}: cannot read model_index.json: {error}") from error
        if found != kind:
            raise UsageError(f"--model {model}: holds a {found}, this command runs a {kind}")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UsageError(
            f"--model {model}: no such folder, and not a hub id (owner/name); give the folder of a {kind}, a "
            "hub id, or --random-weights"
        )
    try:
        with warnings.catch_warnings():
            # 0.42 prefers `dtype`, which the oldest supported release silently ignores.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            pipe = getattr(diffusers, kind).from_pretrained(
                str(folder) if folder.exists() else model, torch_dtype=dtype
            )
    except Exception as error:  # a dozen kinds: missing files, network, gated repositories, broken weights
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"--model {model}: could not be loaded as a {kind}: {reason[0]}. For a hub id, check the network "
            "and that its licence is accepted; for a folder, that it is complete"
        ) from error
    return pipe.to(device)


def build_random(make: Callable[[], Any], device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A model with random weights, built on its device in its dtype: 12 B parameters never pass the host.

    Raises UsageError where the weights alone exceed the device's free memory.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in make().parameters())
    need = parameters * dtype.itemsize
    free = _free_bytes(device)
    if free is not None and need > free:
        raise UsageError(
            f"--random-weights: {parameters / 1e9:.1f} B parameters take {need / GIB:.1f} GiB, {device} has "
            f"{free / GIB:.1f} GiB free; use a larger device or --random-weights tiny"
        )
    default = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def prompt_seed(prompt: str, seed: int) -> int:
    """Seeds the embeddings that stand for a prompt where there is no text encoder."""
    return seed + zlib.crc32(prompt.encode())


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:<n>") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:<n>")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this machine has {count} CUDA devices; try --device cpu")
        return torch.device("cuda", device.index or 0)
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16, unless a CPU has no instructions for it: emulated, it is slower than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if not any(getattr(torch.cpu, check, bool)() for check in checks):
            return torch.float32
    return torch.bfloat16


def parse_size(text: str, multiple: int, what: str) -> tuple[int, int]:
    """`512` or `WxH` → (width, height) in pixels, both a positive multiple of what the model needs."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if not match:
        raise UsageError(f"--size {text}: expected one side (512) or WIDTHxHEIGHT (1280x768)")
    width, height = int(match[1]), int(match[2] or match[1])
    for side in (width, height):
        if side < multiple or side % multiple:
            nearest = max(1, round(side / multiple)) * multiple
            raise UsageError(
                f"--size {text}: {what} needs multiples of {multiple} pixels; nearest to {side}: {nearest}"
            )
    return width, height
