"""One generation with a diffusers pipeline, timed step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock of the host tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Generation:
    """What one pipeline call gave and took.

    Attributes:
        output: the pipeline's first output: pictures or frames in [0, 1] as numpy, or a latent tensor.
        step_ms: duration of each denoising step, transformer and scheduler together.
        total_ms: the whole call: text encoders, every step, VAE.
        peak_bytes: most device memory in use during the call; None where the device does not count it.
    """

    output: Any
    step_ms: tuple[float, ...]
    total_ms: float
    peak_bytes: int | None

    @property
    def denoising_ms(self) -> float:
        return sum(self.step_ms)


@contextmanager
def _first_forward(transformer: torch.nn.Module, note: Callable[[], None]) -> Iterator[None]:
    """Call `note` before every forward of the transformer: the first step begins there, not at the text."""
    hook = transformer.register_forward_pre_hook(lambda module, args: note())
    try:
        yield
    finally:
        hook.remove()


def generate(
    pipe: Any,
    inputs: Mapping[str, Any],
    *,
    steps: int,
    seed: int,
    stop_after: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Generation:
    """Run `pipe(**inputs)` once from `seed`.

    Args:
        pipe: a diffusers pipeline with a `transformer` and `callback_on_step_end`.
        inputs: the call's arguments besides steps, generator and callback.
        steps: denoising steps of the schedule.
        seed: seeds a CPU generator, so that every device starts from the same noise.
        stop_after: leave the loop after this many steps (the output is then not a finished picture).
        on_step: told the number of finished steps, after each.
    """
    device = torch.device(pipe._execution_device)
    marks: list[float] = []

    def begin() -> None:
        if not marks:
            synchronize(device)
            marks.append(time.perf_counter())

    def end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        synchronize(device)
        marks.append(time.perf_counter())
        if on_step is not None:
            on_step(step + 1)
        if stop_after is not None and step + 1 >= stop_after:
            # The pipelines' own switch: the remaining steps are passed over.
            pipeline._interrupt = True
        return {}

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    with _first_forward(pipe.transformer, begin):
        output = pipe(
            **inputs,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=end,
            return_dict=False,
        )[0]
    synchronize(device)
    total_ms = (time.perf_counter() - start) * 1e3
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    step_ms = tuple((after - before) * 1e3 for before, after in pairwise(marks))
    return Generation(output=output, step_ms=step_ms, total_ms=total_ms, peak_bytes=peak)
