"""`chipmunk-run`: generate with a real pipeline, dense and column-sparse side by side."""

from __future__ import annotations

# Only the standard library up here: `--help` must not wait for torch.
import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suites.end_to_end.errors import UsageError
from suites.end_to_end.prompts import PROMPTS

if TYPE_CHECKING:
    import torch

    from chipmunk_kernels.delta.policy import Policy

NEEDED = ("diffusers", "transformers", "skimage", "PIL", "tabulate", "tqdm")
INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chipmunk-run",
        description="A diffusion model, dense and column-sparse from one seed: times, pictures, fidelity.",
    )
    commands = parser.add_subparsers(dest="family", required=True, metavar="{flux,hunyuan}")
    common = argparse.ArgumentParser(add_help=False)
    source = common.add_mutually_exclusive_group()
    source.add_argument("--model", help="pipeline folder or hub id")
    source.add_argument("--random-weights", metavar="NAME", help="a model of this size with random weights")
    common.add_argument("--policy", metavar="NAME|YAML", help="sparse plan; default: the model's own")
    common.add_argument(
        "--profile", metavar="YAML", help="tuned kernels; default: looked up for this machine"
    )
    common.add_argument("--steps", type=int, default=28, help="denoising steps (%(default)s)")
    common.add_argument(
        "--prompt", action="append", metavar="TEXT", help="repeatable; default: the fixed prompts"
    )
    common.add_argument("--prompts", type=int, metavar="N", help="use the first N fixed prompts")
    common.add_argument("--size", metavar="N|WxH", help="pixels; default: the model's own")
    common.add_argument(
        "--seed", type=int, default=0, help="of the noise, the same for both runs (%(default)s)"
    )
    common.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    common.add_argument(
        "--dense-steps", type=int, metavar="N", help="stop the dense run after N steps: times only"
    )
    common.add_argument(
        "--output", type=Path, metavar="FOLDER", help="pictures and record.json; default: outputs/…"
    )
    common.add_argument("--fresh", action="store_true", help="redo prompts that are recorded already")
    common.add_argument("--json", action="store_true", help="print the record instead of tables")
    flux = commands.add_parser(
        "flux",
        parents=[common],
        help="FLUX: the shipped model, a checkpoint, or --random-weights flux-dev | tiny",
        description="FLUX through diffusers' FluxPipeline. Default: the shipped flux-shapes at 512×512.",
    )
    flux.set_defaults(default_prompts=8)
    hunyuan = commands.add_parser(
        "hunyuan",
        parents=[common],
        help="HunyuanVideo: a checkpoint, or --random-weights hunyuan-video | tiny",
        description="HunyuanVideo through diffusers' HunyuanVideoPipeline. "
        "Full size (1280x720, 129 frames) wants a GPU with 80 GB or more.",
    )
    hunyuan.add_argument("--frames", type=int, metavar="N", help="1 more than a multiple of 4 (129)")
    hunyuan.set_defaults(default_prompts=1)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 cannot do what was asked, 130 interrupted (what is finished is recorded)."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    try:
        return _run(options)
    except UsageError as error:
        print(f"chipmunk-run: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to keep
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    for name in ("steps", "dense_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    require_packages()

    import torch

    from suites.end_to_end.record import Record, machine, require_writable, versions
    from suites.end_to_end.session import run_prompts
    from suites.end_to_end.subject import resolve_device, resolve_dtype

    if options.output:
        require_writable(options.output)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    profile = resolve_profile(options.profile, device)
    policy = resolve_policy(options.policy or _own_policy(options), profile)
    subject, dimensions = _subject(options, device, dtype)
    facts = machine(device)
    settings: dict[str, Any] = {
        "family": options.family,
        "model": subject.name,
        **dimensions,
        "steps": options.steps,
        "dense_steps": options.dense_steps,
        "seed": options.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "device_name": facts.get("gpu", facts["cpu"]),
        "policy": policy.as_dict(),
        "profile": options.profile,
    }
    record = Record(options.output or _default_output(settings), settings, fresh=options.fresh)
    record.data.update(
        machine=facts, versions=versions(), dense_baseline=subject.dense_note, profile=_profile_note(profile)
    )
    interrupted = False
    try:
        run_prompts(
            subject,
            prompts,
            policy,
            # Without --profile dispatch walks the same ladder itself, once per process.
            profile if options.profile else None,
            record,
            steps=options.steps,
            seed=options.seed,
            dense_steps=options.dense_steps,
        )
    except KeyboardInterrupt:
        interrupted = True
        print(
            f"\ninterrupted: {len(record.rows(prompts))} of {len(prompts)} prompts are finished; "
            "the same command continues",
            file=sys.stderr,
        )
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{device} ran out of memory ({str(error).splitlines()[0]}); try a smaller --size, fewer "
            f"--frames or --random-weights tiny. Finished prompts are in {record.path}"
        ) from error
    _show(record, prompts, policy, options.json)
    return INTERRUPTED if interrupted else 0


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt and options.prompts is not None:
        raise UsageError(
            "--prompt and --prompts exclude each other: give texts, or a number of the fixed ones"
        )
    if options.prompt:
        if not all(text.strip() for text in options.prompt):
            raise UsageError("--prompt: expected a text, got an empty one")
        return list(dict.fromkeys(options.prompt))
    count = options.prompts
    if count is None:
        count = 1 if options.random_weights else options.default_prompts
    if not 1 <= count <= len(PROMPTS):
        raise UsageError(f"--prompts {count}: expected 1 to {len(PROMPTS)}, the number of fixed prompts")
    if options.random_weights:
        return [f"random embeddings {number}" for number in range(1, count + 1)]
    return list(PROMPTS[:count])


def _subject(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    if options.family == "flux":
        from suites.end_to_end.flux import flux_subject as build

        extra: dict[str, Any] = {}
    else:
        from suites.end_to_end.hunyuan import hunyuan_subject as build  # type: ignore[assignment]

        extra = {"frames": options.frames}
    return build(
        model=options.model,
        random_weights=options.random_weights,
        size=options.size,
        device=device,
        dtype=dtype,
        seed=options.seed,
        **extra,
    )


def quiet_libraries() -> None:
    """Keep the model libraries' advice off stderr unless the user asks for it. Before they are imported."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def require_packages(*more: str) -> None:
    """Raise UsageError where a package that a run needs is not installed."""
    missing = [package for package in (*NEEDED, *more) if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; run: pip install 'chipmunk-kernels[run]'")


def resolve_profile(path: str | None, device: torch.device) -> Any:
    """The tuned profile: the given file, or what the ladder finds for this machine."""
    from chipmunk_kernels import profiles

    if path is None:
        return profiles.find(device)
    try:
        return profiles.load(Path(path))
    except (ValueError, OSError) as error:
        raise UsageError(f"--profile {path}: {error}") from error


def _profile_note(profile: Any) -> str:
    return f"{profile.path.name} ({profile.rung})" if profile.path else str(profile.rung)


def resolve_policy(name: str, profile: Any) -> Policy:
    """By name, the profile's policies first (tuned for it), then the built-in; or a YAML file."""
    from chipmunk_kernels.delta.policies import load_policy

    if name in profile.policies:
        return profile.policies[name]
    try:
        return load_policy(name)
    except (ValueError, OSError) as error:
        raise UsageError(f"--policy {name}: {error}") from error


def _own_policy(options: argparse.Namespace) -> str:
    """The policy of the model that is run."""
    if options.family == "hunyuan":
        return "hunyuan-video"
    shipped = options.model is None and options.random_weights is None
    return "flux-shapes" if shipped else "flux-dev"


def _default_output(settings: dict[str, Any]) -> Path:
    size = "x".join(str(settings[key]) for key in ("width", "height", "frames") if key in settings)
    model = settings["model"].replace(" ", "-")
    name = f"{model}-{settings['policy']['name']}-{size}-{settings['steps']}steps-seed{settings['seed']}"
    return Path("outputs") / f"{name}-{settings['dtype']}-{settings['device'].replace(':', '')}"


def _show(record: Any, prompts: list[str], policy: Policy, as_json: bool) -> None:
    """The record or its tables on stdout, and where everything lies on stderr."""
    from suites.end_to_end.record import plain
    from suites.end_to_end.tables import fact_table, prompt_table, step_table

    rows = record.rows(prompts)
    if as_json:
        print(json.dumps(plain(record.data), indent=1, allow_nan=False))
    elif rows:
        print("\n\n".join((step_table(rows), fact_table(record.data, rows, policy), prompt_table(rows))))
    if rows:
        print(f"written to {record.path.parent}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
