"""A whole run: every prompt both ways, recorded and pictured as it finishes, resumable."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from chipmunk_kernels.delta.policy import Policy
from suites.end_to_end.compare import ORDER, Comparison, compare, warm_up
from suites.end_to_end.picture import Panel, load, render, triptych
from suites.end_to_end.progress import note
from suites.end_to_end.record import Record, write_atomically
from suites.end_to_end.shares import StepParts
from suites.end_to_end.subject import Subject
from suites.end_to_end.tables import summary

SHORT_RUN = 10
SHEET = "all.png"
SIDES = ("dense", "sparse", "difference")


def run_prompts(
    subject: Subject,
    prompts: Sequence[str],
    policy: Policy,
    profile: Any,
    record: Record,
    *,
    steps: int,
    seed: int,
    dense_steps: int | None,
) -> None:
    """Fill `record` with every prompt that it does not hold yet; pictures go beside it.

    A KeyboardInterrupt leaves the record with what is finished.
    """
    waiting = [prompt for prompt in prompts if not record.finished(prompt)]
    done = len(prompts) - len(waiting)
    if done:
        note(f"{done} of {len(prompts)} prompts are in {record.path} already; --fresh redoes them")
    if not waiting:
        return
    if steps < SHORT_RUN:
        note(
            f"{steps} steps: so short a run is mostly full steps, sparsity will not pay; mind the step times"
        )
    record.data["order"] = ORDER
    note("warming up")
    parts: StepParts | None = warm_up(subject, policy, profile, seed)
    for prompt in waiting:
        label = f"{prompts.index(prompt) + 1}/{len(prompts)} "
        result = compare(
            subject,
            prompt,
            policy,
            profile,
            steps=steps,
            seed=seed,
            parts=parts,
            dense_steps=dense_steps,
            label=label,
        )
        parts = result.parts
        if result.dense is not None and result.sparse is not None:
            _draw(record, result, subject)
        record.data["summary"] = summary([*record.data["prompts"], result.row])
        record.add(result.row)
        note(f"{label}{prompt}: {_outcome(result.row)}")
    _draw_all(record, list(prompts))


def _outcome(row: dict[str, Any]) -> str:
    seconds = f"{row['dense']['total_ms'] / 1e3:.2f} s → {row['sparse']['total_ms'] / 1e3:.2f} s"
    if row["speedup"] is None:
        return f"dense step {row['dense_step_ms']:.1f} ms, {_fidelity(row)}"
    return f"{row['speedup']:.2f}× ({seconds}), {_fidelity(row)}"


def _fidelity(row: dict[str, Any]) -> str:
    if row["problem"]:
        return row["problem"]
    if row["psnr_db"] is None:
        return "sparse step " + (f"{row['sparse_step_ms']:.1f} ms" if row["sparse_step_ms"] else "none")
    if row["identical"]:
        return "identical"
    text = f"PSNR {row['psnr_db']:.1f} dB"
    return text if row["ssim"] is None else f"{text}, SSIM {row['ssim']:.3f}"


def _captions(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['dense']['total_ms'] / 1e3:.2f} s",
        f"{row['sparse']['total_ms'] / 1e3:.2f} s: {row['speedup']:.2f}× the speed",
        _fidelity(row),
    ]


def _footer(settings: dict[str, Any], trained: bool) -> str:
    what = "" if trained else " (latents, first channels)"
    frames = f" × {settings['frames']} frames" if "frames" in settings else ""
    return (
        f"{settings['model']}{what}, {settings['width']}×{settings['height']}{frames}, "
        f"{settings['steps']} steps, seed {settings['seed']}, {settings['dtype']}, "
        f"policy {settings['policy']['name']}, {settings['device_name']}"
    )


def _draw(record: Record, result: Comparison, subject: Subject) -> None:
    """Write the prompt's three pictures and the captioned one; note their names in its row."""
    row = result.row
    assert result.dense is not None and result.sparse is not None
    panels = triptych(result.dense, result.sparse, _captions(row), subject.value_range)
    settings = record.data["settings"]
    row["trained"] = subject.trained
    sheet = render([(row["prompt"], panels)], _footer(settings, subject.trained))
    slug = re.sub(r"[^a-z0-9]+", "-", row["prompt"].lower()).strip("-")[:60] or "prompt"
    # Numbered in the order of the record: two prompts may have the same slug.
    stem = f"{len(record.data['prompts']) + 1:02d}-{slug}"
    row["pictures"] = {"side_by_side": f"{stem}.png", "titles": [panel.title for panel in panels]}
    _save(sheet, record.path.parent / f"{stem}.png")
    for side, panel in zip(SIDES, panels, strict=True):
        row["pictures"][side] = f"{stem}-{side}.png"
        _save(Image.fromarray(panel.picture), record.path.parent / row["pictures"][side])


def _draw_all(record: Record, prompts: list[str]) -> None:
    """One sheet of every pictured prompt, from the files: those of an earlier, interrupted run too."""
    folder = record.path.parent
    rows = [row for row in record.rows(prompts) if "pictures" in row]
    files = [[folder / row["pictures"][side] for side in SIDES] for row in rows]
    if len(rows) < 2 or not all(file.is_file() for group in files for file in group):
        return
    panels = [
        [
            Panel(load(file), title, caption)
            for file, title, caption in zip(group, row["pictures"]["titles"], _captions(row), strict=True)
        ]
        for row, group in zip(rows, files, strict=True)
    ]
    sheet = render(
        [(row["prompt"], group) for row, group in zip(rows, panels, strict=True)],
        _footer(record.data["settings"], rows[0]["trained"]),
        most=320,
    )
    _save(sheet, folder / SHEET)


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
