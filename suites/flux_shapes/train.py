"""Train flux-shapes by the clock: `python -m suites.flux_shapes.train --out DIR --minutes 9`.

Rehearsal (every shape once, write and load a pipeline: anything broken fails in the first minute),
autoencoder, text encoders on captions alone, transformer with them at 128, 256 and 512 pixels, evaluation
through FluxPipeline. After each picture size the log says how well captions are followed. The same seed gives
the same initial weights and the same scenes; how many steps fit into the time, and the order of
floating-point sums on a GPU, still differ from run to run.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # before the heavy imports, which are part of the command's time budget

import argparse  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    import torch

    from suites.flux_shapes.clock import Clock, Log
    from suites.flux_shapes.denoiser import DenoiserTrainer, Stage
    from suites.flux_shapes.models import Parts
    from suites.flux_shapes.plan import Plan


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
    p.add_argument(
        "--fresh",
        choices=("text", "all-but-vae"),
        help="parts of the resumed model to make anew: the text encoders, or all but the autoencoder",
    )
    p.add_argument("--vae-seconds", type=float, help="time for the autoencoder (default 70, 0 when resuming)")
    p.add_argument(
        "--text-seconds", type=float, default=20.0, help="time for the text encoders alone (default 20)"
    )
    p.add_argument(
        "--stages", default="128,256,512", help="picture sizes to train at, in order (default 128,256,512)"
    )
    p.add_argument(
        "--learning-rate", type=float, default=1e-3, help="peak rate of the denoiser (default 1e-3)"
    )
    p.add_argument(
        "--miniature", action="store_true", help="tiny model and few steps: a test of the whole path"
    )
    return p


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Command-line entry; returns the exit code. The time budget runs from `started`, or from now."""
    options = parser().parse_args(argv)
    import torch

    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(
            f"--device {options.device}: no CUDA device here; use --device cpu --miniature to test the path"
        )
        return 2
    from suites.flux_shapes.plan import make_plan

    try:
        plan = make_plan(options)
    except ValueError as error:
        print(error)
        return 2
    run(plan, options.out, options.minutes * 60, options.device, started)
    return 0


def autocast_for(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """bfloat16 autocast on a GPU, nothing on a CPU."""
    import torch

    if device.type != "cuda":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, "cuda", torch.bfloat16)


def run(plan: Plan, out: Path, budget_s: float, device_name: str, started: float | None = None) -> None:
    """Train by the plan and leave the archive, the grid and the log in `out`."""
    import torch

    from suites.flux_shapes.clock import Clock, Log

    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(budget_s, started)
    log = Log(clock, out / "log.json")
    device = torch.device(device_name)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    parts = initial_parts(plan, device)
    millions = sum(p.numel() for m in (parts.vae, parts.denoiser) for p in m.parameters()) / 1e6
    log.add(
        "start", device=_device_name(device), torch=torch.__version__, seed=plan.seed, parameters_m=millions
    )
    with _attention_backends(device):
        _train(plan, parts, out, device, clock, log)
    log.write()


def _train(plan: Plan, parts: Parts, out: Path, device: torch.device, clock: Clock, log: Log) -> None:
    from suites.flux_shapes.autoencoder import restored_psnr_db, train_autoencoder
    from suites.flux_shapes.denoiser import DenoiserTrainer
    from suites.flux_shapes.text import train_text

    autocast = autocast_for(device)
    _rehearse(plan, parts, out, device, clock, log)
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
    psnr = restored_psnr_db(parts.vae, plan.evaluate_size, 4, plan.seed + 2)
    log.add("autoencoder", size=plan.evaluate_size, restored_psnr_db=psnr)
    if plan.text.seconds > 0:
        train_text(parts.denoiser, parts.captioner(device), plan.text, plan.seed, clock, log)
    trainer = DenoiserTrainer(parts, plan.recipe, plan.seed, autocast, log)
    trainer.run(
        plan.stages,
        clock.budget_s - plan.closing_seconds,
        clock,
        functools.partial(_save, trainer, parts, out, log),
        plan.save_every_s,
        functools.partial(_preview, plan, trainer, log),
    )
    _sample_and_score(plan, out, device, log, plan.scored_prompts, plan.sample_steps)


def _rehearse(plan: Plan, parts: Parts, out: Path, device: torch.device, clock: Clock, log: Log) -> None:
    """Every training shape, then saving, loading, sampling and scoring, with the weights as they are."""
    from suites.flux_shapes.denoiser import DenoiserTrainer
    from suites.flux_shapes.text import train_text

    trainer = DenoiserTrainer(parts, plan.recipe, plan.seed, autocast_for(device), log)
    trainer.rehearse(plan.stages)
    once = dataclasses.replace(plan.text, seconds=60.0, most_steps=1)
    train_text(copy.deepcopy(parts.denoiser), parts.captioner(device), once, plan.seed, clock, log)
    _save(trainer, parts, out, log, "rehearsal")
    _preview(plan, trainer, log, plan.stages[0])
    _sample_and_score(plan, out, device, log, prompts=1, steps=1)
    log.add("rehearsed")


def initial_parts(plan: Plan, device: torch.device) -> Parts:
    """The parts that training starts from: fresh, resumed, or resumed with some parts fresh."""
    from suites.flux_shapes.models import build

    fresh = build(plan.sizes, device, plan.seed)
    if plan.resume is None:
        return fresh
    resumed = _resumed(plan.resume, device)
    if plan.fresh == "text":
        resumed.denoiser.t5, resumed.denoiser.clip = fresh.denoiser.t5, fresh.denoiser.clip
    elif plan.fresh == "all-but-vae":
        resumed.denoiser = fresh.denoiser
    return resumed


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


def _preview(plan: Plan, trainer: DenoiserTrainer, log: Log, stage: Stage) -> None:
    """How well captions are followed at a stage's own picture size."""
    from suites.flux_shapes.evaluation import held_out_scenes, score

    scenes = held_out_scenes(plan.preview_prompts)
    pictures = trainer.sample(scenes.to(trainer.device), stage.task, plan.preview_steps, plan.seed)
    result = score(pictures, [scenes.describe(row) for row in range(len(scenes))])
    log.add("preview", stage=stage.name, follow=list(result.pictures), aspects=result.aspects)


def _sample_and_score(
    plan: Plan, out: Path, device: torch.device, log: Log, prompts: int, steps: int
) -> None:
    """Load what was saved as a user would, sample held-out captions, write the grid and the scores."""
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
    size = plan.evaluate_size
    pictures = sample(pipe, captions, size, steps, plan.seed, batch=16)
    save_grid(pictures[: plan.grid_prompts], out / "grid.png")
    result = score(pictures, descriptions)
    log.add("score", size=size, steps=steps, follow=list(result.pictures), aspects=result.aspects)
    if prompts > 1:
        print(f"--- {size}x{size}, {steps} steps\n{result.table()}")
        print("\n".join(result.misses[:12]), flush=True)
    log.write()


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextlib.contextmanager
def _attention_backends(device: torch.device) -> Any:
    """Flash attention on a GPU: cuDNN's backward was faster but faulted at 320 tokens (torch 2.11, H200)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


if __name__ == "__main__":
    raise SystemExit(main(started=STARTED))
