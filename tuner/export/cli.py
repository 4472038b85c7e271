"""`chipmunk-export`: a tuned profile or policy in another project's format.

Imports nothing heavy until it has work: `--help` must answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.export.result import Export, ExportError

if TYPE_CHECKING:
    from chipmunk_kernels.delta.policy import Policy
    from chipmunk_kernels.profiles import Profile

TARGETS = {
    "chipmunk": "the method's authors: one chipmunk-config.yml from a policy",
    "vllm": "vLLM's fused-MoE manner: one JSON of Triton launch settings per operation",
}
DEFAULT_FOLDER = {"chipmunk": ".", "vllm": "vllm-configs"}


def parser() -> argparse.ArgumentParser:
    """The command line of `chipmunk-export`."""
    result = argparse.ArgumentParser(
        prog="chipmunk-export",
        description="Write a tuned profile in another project's format, and name what it cannot express.",
        epilog="targets: " + "; ".join(f"{name}: {about}" for name, about in TARGETS.items()),
    )
    result.add_argument("--to", choices=TARGETS, help="target format")
    result.add_argument("--profile", type=Path, help="profile YAML (default: the one this machine uses)")
    result.add_argument("--policy", help="policy of the profile, built in, or a YAML (default: the only one)")
    result.add_argument("--output", type=Path, help="folder to write into, or a .yml file for --to chipmunk")
    result.add_argument(
        "--steps", type=int, default=50, help="denoising steps that schedules are written for"
    )
    result.add_argument(
        "--family", choices=("image", "video"), help="path of the target (default: by the policy)"
    )
    result.add_argument(
        "--video-tokens", type=int, help="tokens of the video; needed to express a local window"
    )
    result.add_argument(
        "--list", action="store_true", help="show targets, policies and entries; write nothing"
    )
    result.add_argument("--json", action="store_true", help="report on stdout as JSON")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if nothing could be exported."""
    command = parser()
    options = command.parse_args(arguments)
    if not options.list and options.to is None:
        command.error("--to is needed: " + " or ".join(TARGETS))
    try:
        profile = _profile(options.profile)
        report = _listing(profile) if options.list else _export(options, profile)
    except ValueError as error:  # ExportError, ProfileError and a policy's own
        print(f"chipmunk-export: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else _readable(report))
    return 0


def _profile(path: Path | None) -> Profile:
    """The named profile whole, whatever device it is for, or the one that this machine would use."""
    import torch

    from chipmunk_kernels import profiles

    if path is not None:
        return profiles.load(path)
    return profiles.find("cuda" if torch.cuda.is_available() else "cpu")


def _export(options: argparse.Namespace, profile: Profile) -> dict[str, Any]:
    if options.to == "vllm":
        from tuner.export import vllm_moe

        result = vllm_moe.export(profile)
    else:
        from tuner.export import chipmunk_config

        result = chipmunk_config.export(
            _policy(options.policy, profile),
            steps=options.steps,
            family=options.family,
            video_tokens=options.video_tokens,
            profile=profile,
        )
    folder, result = _place(options, result)
    written = result.write(folder)
    for warning in result.warnings:
        print(f"not expressed: {warning}", file=sys.stderr)
    return {
        "target": options.to,
        "profile": str(profile.path) if profile.path else None,
        "files": [str(path) for path in written],
        "not_expressed": list(result.warnings),
    }


def _place(options: argparse.Namespace, result: Export) -> tuple[Path, Export]:
    """Where to write: `--output` is a folder, or for a single-file target that file."""
    output = options.output or Path(DEFAULT_FOLDER[options.to])
    if options.to == "chipmunk" and output.suffix in (".yml", ".yaml") and not output.is_dir():
        (text,) = result.files.values()
        return output.parent, Export({output.name: text}, result.warnings)
    if output.exists() and not output.is_dir():
        raise ExportError(f"--output: {output} is a file; expected a folder")
    return output, result


def _policy(name: str | None, profile: Profile) -> Policy:
    """By name: the profile's own first, then the built-in ones. Without a name, the profile's only one."""
    from chipmunk_kernels.delta import policies

    if name is None:
        if len(profile.policies) == 1:
            return next(iter(profile.policies.values()))
        raise ExportError(f"--policy is needed: one of {', '.join(_policy_names(profile))}")
    return profile.policies.get(name) or policies.load_policy(name)


def _policy_names(profile: Profile) -> list[str]:
    from chipmunk_kernels.delta import policies

    return sorted({*profile.policies, *policies.names()})


def _listing(profile: Profile) -> dict[str, Any]:
    return {
        "targets": TARGETS,
        "profile": str(profile.path) if profile.path else None,
        "device": profile.device.get("name"),
        "policies": _policy_names(profile),
        "kernels": [{"problem": entry.problem.key, "backend": entry.backend} for entry in profile.entries],
    }


def _readable(report: dict[str, Any]) -> str:
    if "files" in report:
        return "\n".join(f"wrote {path}" for path in report["files"])
    lines = ["targets"]
    lines += [f"  {name}: {about}" for name, about in report["targets"].items()]
    lines += ["policies", *(f"  {name}" for name in report["policies"])]
    lines += [f"kernels ({report['profile'] or 'no tuned profile: safe defaults'})"]
    lines += [f"  {row['problem']}: {row['backend']}" for row in report["kernels"]] or ["  none"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
