"""Search a model's policy: the fastest whose pictures stay close enough to the dense ones.

    python -m suites.quality.tune_policy flux --model FOLDER --trials 40 --psnr-floor 30 --output policy.yaml

Dense pictures and times are made once and cached: every prompt at several seeds, since a policy that holds on
one seed may fail on the next. The policy to begin from tells which are hardest. A trial runs those one after
another and ends at the first that falls below the floor, or that is slower than the best found so far: most
trials cost one generation. The best are then checked over all; the first that holds everywhere is written.
"""

from __future__ import annotations

# Only the standard library up here: `--help` must not wait for torch.
import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suites.end_to_end.cli import quiet_libraries, require_packages, resolve_policy, resolve_profile
from suites.end_to_end.errors import UsageError
from suites.end_to_end.prompts import PROMPTS

if TYPE_CHECKING:
    from suites.quality.policy_search import Case, Search

INTERRUPTED = 130
NOT_FOUND = 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m suites.quality.tune_policy",
        description="Search a model's policy: the fastest above a PSNR floor against its own dense pictures.",
    )
    parser.add_argument("family", choices=("flux",))
    parser.add_argument("--model", help="pipeline folder or hub id; default: the shipped flux-shapes")
    parser.add_argument("--random-weights", metavar="NAME", help="for trying the search itself")
    parser.add_argument("--name", help="of the policy; default: that of --start")
    parser.add_argument("--start", default="flux-shapes", help="policy to begin from (%(default)s)")
    parser.add_argument("--trials", type=int, default=40, help="in all, earlier ones included (%(default)s)")
    parser.add_argument("--psnr-floor", type=float, default=30.0, metavar="DB", help="(%(default)s)")
    parser.add_argument(
        "--search-cases",
        type=int,
        default=2,
        metavar="N",
        help="pictures per trial, the hardest of those checked (%(default)s)",
    )
    parser.add_argument("--check-prompts", type=int, default=len(PROMPTS), metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--check-seeds", type=int, default=2, metavar="N", help="seeds of each checked prompt (%(default)s)"
    )
    parser.add_argument("--finalists", type=int, default=4, metavar="N", help="checked at most (%(default)s)")
    parser.add_argument(
        "--need-mlp",
        action="store_true",
        help="write a policy whose MLP is sparse too: where it is a small part of the time, dense may win",
    )
    parser.add_argument("--steps", type=int, default=28, help="(%(default)s)")
    parser.add_argument("--size", metavar="N|WxH", help="pixels; default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="the first one (%(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--profile", metavar="YAML", help="tuned kernels; default: looked up for this machine"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/tune-policy"), metavar="FOLDER", help="%(default)s"
    )
    parser.add_argument("--output", type=Path, metavar="YAML", help="default: <work>/<name>.yaml")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 1 no policy holds the floor, 2 cannot do what was asked, 130 interrupted."""
    options = _parser().parse_args(arguments)
    quiet_libraries()
    try:
        return _run(options)
    except UsageError as error:
        print(f"tune_policy: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to keep
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    for name in ("trials", "search_cases", "check_prompts", "check_seeds", "finalists", "steps"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if options.check_prompts > len(PROMPTS):
        raise UsageError(f"--check-prompts {options.check_prompts}: there are {len(PROMPTS)} fixed prompts")
    require_packages("optuna")
    from suites.end_to_end.flux import flux_subject
    from suites.end_to_end.subject import resolve_device, resolve_dtype
    from suites.quality.policy_search import Search, report

    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    profile = resolve_profile(options.profile, device)
    start = resolve_policy(options.start, profile)
    subject, dimensions = flux_subject(
        model=options.model,
        random_weights=options.random_weights,
        size=options.size,
        device=device,
        dtype=dtype,
        seed=options.seed,
    )
    settings = {
        "model": subject.name,
        **dimensions,
        "steps": options.steps,
        "seed": options.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    folder = options.work / f"{subject.name.replace(' ', '-')}-{_key(settings)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--work {options.work}: cannot write there ({error.strerror or error})") from error
    name = options.name or start.name
    output = options.output or options.work / f"{name}.yaml"
    search = Search(
        subject=subject,
        profile=profile if options.profile else None,
        name=name,
        start=start,
        folder=folder,
        steps=options.steps,
        seed=options.seed,
        floor=options.psnr_floor,
        cases=_every(options),
        per_trial=options.search_cases,
    )
    try:
        search.run(options.trials)
        found = search.check(options.finalists, options.need_mlp)
    except KeyboardInterrupt:
        print("\ninterrupted: finished trials are kept; the same command continues", file=sys.stderr)
        return INTERRUPTED
    print(report(search.study()))
    if found is None:
        print(
            f"no policy holds {options.psnr_floor} dB on every picture; lower --psnr-floor or raise --trials",
            file=sys.stderr,
        )
        return NOT_FOUND
    _write(output, found, search, settings)
    return 0


def _every(options: argparse.Namespace) -> list[Case]:
    """Every checked prompt at every checked seed."""
    from suites.quality.policy_search import Case

    seeds = range(options.seed, options.seed + options.check_seeds)
    return [Case(prompt, seed) for seed in seeds for prompt in PROMPTS[: options.check_prompts]]


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def _write(output: Path, found: Any, search: Search, settings: dict[str, Any]) -> None:
    """The policy as YAML, with what was measured in comments above it."""
    import yaml

    from suites.end_to_end.record import write_atomically

    lines = [
        f"Found by suites.quality.tune_policy: the fastest of {search.finished} trials that keeps "
        f"{search.floor:g} dB on all {len(found.psnr_db)} pictures (prompts × seeds)"
        + (", attention and MLP sparse." if found.policy.mlp else ", attention sparse."),
        ", ".join(f"{key} {value}" for key, value in settings.items()),
        f"PSNR lowest {min(found.psnr_db):.1f} dB, mean {statistics.fmean(found.psnr_db):.1f} dB.",
        f"About {found.speedup:.2f}x over dense runs made earlier; chipmunk-run measures both side by side.",
    ]
    text = "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(found.policy.as_dict(), sort_keys=False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text.encode())
    except OSError as error:
        raise UsageError(f"--output {output}: could not be written ({error.strerror or error})") from error
    print(f"{output}: {lines[-2]} {lines[-1]}")


if __name__ == "__main__":
    sys.exit(main())
