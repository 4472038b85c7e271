"""One prompt, dense and sparse from one seed in one process, and what there is to say about the two."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chipmunk_kernels.delta.policy import Policy, Schedule
from suites.end_to_end.errors import UsageError
from suites.end_to_end.generate import Generation, generate
from suites.end_to_end.progress import steps_bar
from suites.end_to_end.shares import StepParts, ceiling, measured_parts
from suites.end_to_end.subject import Subject
from suites.quality.fidelity import psnr, ssim

ORDER = "per prompt: dense, then sparse, in one process, after a warm-up of both"


@dataclass(frozen=True)
class SparseRun:
    """A sparse generation with what the engine reports of it."""

    generation: Generation
    report: dict[str, Any]
    setup_ms: float


def run_dense(
    subject: Subject,
    inputs: dict[str, Any],
    *,
    steps: int,
    seed: int,
    stop_after: int | None = None,
    label: str,
) -> Generation:
    """One dense generation, in the context that makes it a fair baseline."""
    with subject.dense(), steps_bar(label, stop_after or steps) as on_step:
        return generate(subject.pipe, inputs, steps=steps, seed=seed, stop_after=stop_after, on_step=on_step)


def run_sparse(
    subject: Subject,
    inputs: dict[str, Any],
    policy: Policy,
    profile: Any,
    *,
    steps: int,
    seed: int,
    label: str,
) -> SparseRun:
    """Put the method in, generate, ask for its report, take it out again whatever happened."""
    from chipmunk_kernels.integrations.diffusers import apply_chipmunk, remove_chipmunk

    start = time.perf_counter()
    try:
        handle = apply_chipmunk(subject.pipe, policy, profile)
    except ValueError as error:
        raise UsageError(f"policy {policy.name!r} cannot be applied to {subject.name}: {error}") from error
    try:
        setup_ms = (time.perf_counter() - start) * 1e3
        with steps_bar(label, steps) as on_step:
            generation = generate(subject.pipe, inputs, steps=steps, seed=seed, on_step=on_step)
        return SparseRun(generation, handle.report().as_dict(), setup_ms)
    finally:
        remove_chipmunk(subject.pipe)


def warm_up(subject: Subject, policy: Policy, profile: Any, seed: int) -> StepParts | None:
    """Run every kernel once: dense, then two full steps and a sparse one (the second full step refreshes).

    Returns:
        The parts of a dense step, unless the subject leaves that to its timed run.
    """
    inputs = subject.warm_inputs("warm-up", seed)
    transformer, device = subject.pipe.transformer, subject.pipe._execution_device
    dense_steps = 1 if subject.parts_in_run else 4
    watch = nullcontext() if subject.parts_in_run else measured_parts(transformer, (1, 2, 3), device)
    with watch as parts:
        run_dense(subject, inputs, steps=dense_steps, seed=seed, label="warm-up, dense")
    brief = Schedule(first=2, every=0)
    quick = replace(
        policy,
        attention=policy.attention and replace(policy.attention, schedule=brief),
        mlp=policy.mlp and replace(policy.mlp, schedule=brief),
    )
    run_sparse(subject, inputs, quick, profile, steps=3, seed=seed, label="warm-up, sparse")
    return parts


@dataclass(frozen=True)
class Comparison:
    """A prompt's row of the record, and both outputs as arrays (None where the dense run stopped early)."""

    row: dict[str, Any]
    dense: NDArray | None
    sparse: NDArray | None
    parts: StepParts | None


def compare(
    subject: Subject,
    prompt: str,
    policy: Policy,
    profile: Any,
    *,
    steps: int,
    seed: int,
    parts: StepParts | None,
    dense_steps: int | None = None,
    label: str = "",
) -> Comparison:
    """Run one prompt both ways.

    Args:
        subject: what to run.
        prompt: the text, or a label where embeddings are random.
        policy: the sparse plan.
        profile: tuned kernels; None lets dispatch find them.
        steps: denoising steps.
        seed: of the noise (and of random embeddings), the same for both.
        parts: a dense step taken apart earlier; None to do so in this dense run's step 0.
        dense_steps: stop the dense run early: only its step time is wanted.
        label: begins the progress lines.
    """
    inputs = subject.inputs(prompt, seed)
    stop_after = dense_steps if dense_steps is not None and dense_steps < steps else None
    transformer, device = subject.pipe.transformer, subject.pipe._execution_device
    watch = nullcontext(parts) if parts is not None else measured_parts(transformer, (0,), device)
    with watch as measured:
        dense = run_dense(
            subject, inputs, steps=steps, seed=seed, stop_after=stop_after, label=f"{label}dense"
        )
    sparse = run_sparse(subject, inputs, policy, profile, steps=steps, seed=seed, label=f"{label}sparse")
    # A step that was also taken apart, at a size not warmed up, does not count where there is another.
    timed = dense.step_ms[1:] if parts is None and len(dense.step_ms) > 1 else dense.step_ms
    row = _row(prompt, seed, dense, timed, sparse, policy, steps, measured, subject.layers)
    if stop_after is not None:
        return Comparison(row, None, None, measured)
    first, second = subject.array(dense.output), subject.array(sparse.generation.output)
    row["speedup"] = dense.total_ms / sparse.generation.total_ms
    for name, output in (("dense", first), ("sparse", second)):
        if not np.isfinite(output).all():
            row["problem"] = f"the {name} output holds NaN or infinity"
            return Comparison(row, None, None, measured)
    row["fidelity_of"] = "pictures" if subject.value_range is not None else "latents (random weights)"
    row["psnr_db"] = psnr(first, second, subject.value_range)
    row["identical"] = math.isinf(row["psnr_db"])
    row["ssim"] = ssim(first, second, subject.value_range) if min(first.shape[-3:-1]) >= 11 else None
    return Comparison(row, first, second, measured)


def _row(
    prompt: str,
    seed: int,
    dense: Generation,
    timed: Sequence[float],
    sparse: SparseRun,
    policy: Policy,
    steps: int,
    parts: StepParts | None,
    layers: int,
) -> dict[str, Any]:
    report = sparse.report
    kinds = list(report["steps"])
    by_kind = {
        kind: [ms for ms, k in zip(sparse.generation.step_ms, kinds, strict=False) if k == kind]
        for kind in ("full", "sparse")
    }
    typical = {kind: statistics.median(times) if times else None for kind, times in by_kind.items()}
    dense_ms = statistics.median(timed)
    row: dict[str, Any] = {
        "prompt": prompt,
        "seed": seed,
        "dense": {"total_ms": dense.total_ms, "step_ms": dense.step_ms, "peak_bytes": dense.peak_bytes},
        "sparse": {
            "total_ms": sparse.generation.total_ms,
            "step_ms": sparse.generation.step_ms,
            "steps": kinds,
            "setup_ms": sparse.setup_ms,
            "peak_bytes": sparse.generation.peak_bytes,
        },
        "dense_step_ms": dense_ms,
        "full_step_ms": typical["full"],
        "sparse_step_ms": typical["sparse"],
        "step_speedup": dense_ms / typical["sparse"] if typical["sparse"] else None,
        "denoising_speedup": dense_ms * steps / sparse.generation.denoising_ms,
        "speedup": None,
        "psnr_db": None,
        "ssim": None,
        "identical": False,
        "problem": None,
    }
    for key in (
        "notes",
        "layers",
        "attention_density",
        "mlp_density",
        "cache_bytes",
        "dense_calls",
        "sparse_calls",
        "full_calls",
    ):
        row[key] = report[key]
    if parts is not None and parts.step_ms:
        row["ceiling"] = ceiling(
            parts,
            policy,
            steps=steps,
            layers=layers,
            attention_density=report["attention_density"],
            mlp_density=report["mlp_density"],
        )
        row["parts"] = parts.as_dict()
    return row


def predicted_speedup(row: dict[str, Any], policy: Policy, steps: int) -> float | None:
    """Denoising speedup of a longer schedule, from this row's step times; None where a kind was not timed."""
    if row["full_step_ms"] is None or row["sparse_step_ms"] is None:
        return None
    parts = [part.schedule for part in (policy.attention, policy.mlp) if part is not None]
    full = sum(all(schedule.is_full(step) for schedule in parts) for step in range(steps))
    return (
        row["dense_step_ms"] * steps / (row["full_step_ms"] * full + row["sparse_step_ms"] * (steps - full))
    )
