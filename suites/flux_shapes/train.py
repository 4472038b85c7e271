"""Train flux-shapes from nothing, by the clock: `python -m suites.flux_shapes.train --out DIR --minutes 9`.

Stages: rehearsal (compile and run every shape once, write and load a pipeline: anything broken fails in the first
minute), autoencoder, transformer with its text encoders at 128, 256 and 512 pixels, evaluation through FluxPipeline.
The same seed gives the same initial weights and the same scenes; how many steps fit into the time, and the order of
floating-point sums on a GPU, still differ from run to run.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before the heavy imports, which are part of the time budget

import argparse  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import functools  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    import torch

    from suites.flux_shapes.clock import Clock, Log
    from suites.flux_shapes.denoiser import DenoiserTrainer, Recipe, Stage
    from suites.flux_shapes.models import Parts, Sizes


@dataclass(frozen=True)
class Plan:
    """Everything that a run depends on apart from the device and its speed."""

    sizes: Sizes
    stages: tuple[Stage, ...]
    recipe: Recipe
    seed: int
    vae_seconds: float = 70.0
    vae_size: int = 256
    vae_batch: int = 32
    vae_most_steps: int = 10**9
    closing_seconds: float = 25.0
    save_every_s: float = 90.0
    grid_prompts: int = 8
    scored_prompts: int = 48
    sample_steps: int = 28
    resume: Path | None = None
    evaluate_sizes: tuple[int, ...] = (512,)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m suites.flux_shapes.train", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument(
        "--out", type=Path, required=True, help="directory for the archive parts, grid.png and log.json"
    )
    p.add_argument(
        "--minutes", type=float, default=9.0, help="wall clock of the whole run, imports included (default 9)"
    )
    p.add_argument("--seed", type=int, default=0, help="initial weights, scenes and noise (default 0)")
    p.add_argument("--device", default="cuda", help="torch device (default cuda)")
    p.add_argument(
        "--resume", type=Path, help="pipeline folder, or directory with archive parts, to train further"
    )
    p.add_argument("--vae-seconds", type=float, help="time for the autoencoder (default 70, 0 when resuming)")
    p.add_argument(
        "--stages", default="128,256,512", help="picture sizes to train at, in order (default 128,256,512)"
    )
    p.add_argument(
        "--learning-rate", type=float, default=1e-3, help="peak rate of the denoiser (default 1e-3)"
    )
    p.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    p.add_argument(
        "--miniature", action="store_true", help="tiny model and few steps: a test of the whole path"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit code."""
    options = parser().parse_args(argv)
    import torch

    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(
            f"--device {options.device}: no CUDA device here; use --device cpu --miniature to test the path"
        )
        return 2
    run(make_plan(options), options.out, options.minutes * 60, options.device, not options.no_compile)
    return 0


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that the command line asks for."""
    from suites.flux_shapes.denoiser import STAGES, Recipe, Stage, Task
    from suites.flux_shapes.models import FULL, MINIATURE

    if options.miniature:
        stages = (Stage("32", 0.5, ((Task(32, 4, 2), 1.0),)), Stage("64", 0.5, ((Task(64, 2, 1), 1.0),)))
        return Plan(
            MINIATURE, stages, Recipe(warmup_steps=2, most_steps_per_stage=3), options.seed,
            vae_size=32, vae_batch=4, vae_most_steps=3, closing_seconds=0.0, grid_prompts=2, scored_prompts=4,
            sample_steps=2, resume=options.resume, evaluate_sizes=(64,),
        )  # fmt: skip
    names = options.stages.split(",")
    kept = [stage for stage in STAGES if stage.name in names]
    if len(kept) != len(names):
        raise SystemExit(
            f"--stages: expected some of {','.join(s.name for s in STAGES)}, got {options.stages}"
        )
    total = sum(stage.share for stage in kept)
    stages = tuple(Stage(stage.name, stage.share / total, stage.tasks) for stage in kept)
    vae_seconds = (
        options.vae_seconds if options.vae_seconds is not None else (0.0 if options.resume else 70.0)
    )
    recipe = Recipe(learning_rate=options.learning_rate)
    return Plan(FULL, stages, recipe, options.seed, vae_seconds=vae_seconds, resume=options.resume)


def autocast_for(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """bfloat16 autocast on a GPU, nothing on a CPU."""
    import torch

    if device.type != "cuda":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, "cuda", torch.bfloat16)


def run(plan: Plan, out: Path, budget_s: float, device_name: str, compiled: bool) -> None:
    """Train by the plan and leave the archive, the grid and the log in `out`."""
    import torch

    from suites.flux_shapes.clock import Clock, Log
    from suites.flux_shapes.models import build

    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(budget_s, STARTED)
    log = Log(clock, out / "log.json")
    device = torch.device(device_name)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    parts = _resumed(plan.resume, device) if plan.resume else build(plan.sizes, device, plan.seed)
    millions = sum(p.numel() for m in (parts.vae, parts.denoiser) for p in m.parameters()) / 1e6
    log.add(
        "start", device=_device_name(device), torch=torch.__version__, seed=plan.seed, parameters_m=millions
    )
    with _attention_backends(device):
        _train(plan, parts, out, device, compiled and device.type == "cuda", clock, log)
    log.write()


def _train(
    plan: Plan, parts: Parts, out: Path, device: torch.device, compiled: bool, clock: Clock, log: Log
) -> None:
    from suites.flux_shapes.autoencoder import restored_psnr_db, train_autoencoder
    from suites.flux_shapes.denoiser import DenoiserTrainer

    autocast = autocast_for(device)
    trainer = DenoiserTrainer(parts, plan.recipe, plan.seed, autocast, compiled, log)
    trainer.rehearse(plan.stages)
    log.add("rehearsed")
    save = functools.partial(_save, trainer, parts, out, log)
    save("rehearsal")
    _sample_and_score(plan, out, device, log, prompts=1, steps=1)
    if plan.vae_seconds > 0:
        train_autoencoder(
            parts.vae,
            plan.vae_seconds,
            plan.vae_size,
            plan.vae_batch,
            plan.seed,
            autocast,
            clock,
            log,
            plan.vae_most_steps,
        )
    parts.vae.eval().requires_grad_(False)
    for size in plan.evaluate_sizes:
        log.add(
            "autoencoder", size=size, restored_psnr_db=restored_psnr_db(parts.vae, size, 4, plan.seed + 2)
        )
    until_s = clock.budget_s - plan.closing_seconds
    trainer.run(plan.stages, until_s, clock, save, plan.save_every_s)
    _sample_and_score(plan, out, device, log, plan.scored_prompts, plan.sample_steps)


def _resumed(source: Path, device: torch.device) -> Parts:
    from suites.flux_shapes.archive import read_parts
    from suites.flux_shapes.models import load

    if (source / "model_index.json").exists():
        return load(source, device)
    with tempfile.TemporaryDirectory() as folder:
        read_parts(source, Path(folder))
        return load(Path(folder), device)


def _save(trainer: DenoiserTrainer, parts: Parts, out: Path, log: Log, stage: str) -> None:
    """Write the averaged weights in bfloat16 as a pipeline folder, archived in parts; and the log so far."""
    import torch

    from suites.flux_shapes.archive import write_parts
    from suites.flux_shapes.folder import write_folder
    from suites.flux_shapes.models import Parts

    if not all(p.isfinite().all() for p in trainer.ema.module.parameters()):
        log.add("not saved", stage=stage, reason="averaged weights are not finite")
        return
    average = Parts(
        copy.deepcopy(parts.vae), copy.deepcopy(trainer.ema.module), parts.clip_tokenizer, parts.t5_tokenizer
    )
    with tempfile.TemporaryDirectory() as folder:
        write_folder(average.pipeline(torch.bfloat16), Path(folder))
        written = write_parts(Path(folder), out)
    log.add("saved", stage=stage, step=trainer.step, megabytes=sum(p.stat().st_size for p in written) / 1e6)
    log.write()


def _sample_and_score(
    plan: Plan, out: Path, device: torch.device, log: Log, prompts: int, steps: int
) -> None:
    """Load what was saved as a user would, sample held-out captions in float32, and write the grid and the scores."""
    import torch
    from diffusers import FluxPipeline

    from suites.flux_shapes.archive import read_parts
    from suites.flux_shapes.evaluation import held_out, sample, save_grid, score

    folder = Path(tempfile.mkdtemp())
    read_parts(out, folder)
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    shutil.rmtree(folder)
    descriptions = held_out(prompts)
    captions = [description.caption() for description in descriptions]
    for size in plan.evaluate_sizes:
        pictures = sample(pipe, captions, size, steps, plan.seed, batch=16)
        if size == plan.evaluate_sizes[0]:
            save_grid(pictures[: plan.grid_prompts], out / "grid.png")
        result = score(pictures, descriptions)
        log.add("score", size=size, steps=steps, follow=list(result.pictures), aspects=result.aspects)
        if prompts > 1:
            print(
                f"--- {size}x{size}, {steps} steps\n{result.table()}\n" + "\n".join(result.misses[:12]),
                flush=True,
            )
        log.write()


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextlib.contextmanager
def _attention_backends(device: torch.device) -> Any:
    """Flash attention on a GPU: cuDNN's backward is 1.8 times faster but faulted at 320 tokens (torch 2.11, H200)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
