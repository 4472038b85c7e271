"""What runs beside what: the kernels of one full step on a time line, a row for each stream.

    python -m suites.benchmarks.timeline --out FOLDER [--heads 24] [--tokens 34560] [--mlp-tokens 3840]

Runs a full step of the MLP delta, which has one stream, and of the attention delta, once with the side stream
and once in place, under torch's profiler, and writes for each a picture (`timeline-*.html`) and the numbers
(`timeline.json`): when every kernel ran on which stream, and how much of the side stream's time was hidden.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WIDTH, ROW = 1600, 34  # of the picture, in pixels
COLOURS = ("#4878a8", "#d1783c", "#5a9e5a", "#a05a9e", "#b8a03c", "#5ab0b0", "#c05060", "#7a6a50")
OTHERS = "#a0a0a0"
NAME = 70  # letters of a kernel's name in the legend
HEAD_START = 50_000_000
"""Clock cycles for which the device spins first, not to wait for a host that the profiler slows down."""
SPIN = "spin_kernel"


@dataclass(frozen=True)
class Interval:
    """One kernel or copy: times in microseconds from the start of the step."""

    name: str
    stream: int
    start_us: float
    end_us: float


def intervals(trace: dict[str, Any]) -> list[Interval]:
    """The device's work in a chrome trace of torch's profiler, in the order in which it began."""
    found = [
        (event["ts"], event["ts"] + event["dur"], event["name"], int(event["args"]["stream"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and SPIN not in event["name"]
    ]
    first = min((start for start, *_ in found), default=0.0)
    ordered = sorted(found)
    return [Interval(name, stream, start - first, end - first) for start, end, name, stream in ordered]


def merged(parts: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, as disjoint ones in order."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(parts):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def shared_us(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float:
    """How long both of two disjoint, ordered lists of intervals were at work."""
    return sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in ours
        for other_start, other_end in theirs
    )


def summary(found: Sequence[Interval]) -> dict[str, Any]:
    """Whole duration, busy time of each stream, and how much of the lesser streams' time was hidden.

    The stream with the most work counts as the main one.
    """
    busy = {
        stream: merged((part.start_us, part.end_us) for part in found if part.stream == stream)
        for stream in sorted({part.stream for part in found})
    }
    busy_us = {stream: sum(end - start for start, end in parts) for stream, parts in busy.items()}
    if not busy:
        return {"span_us": 0.0, "busy_us": {}, "side_us": 0.0, "hidden_us": 0.0}
    main = max(busy_us, key=lambda stream: busy_us[stream])
    side = merged(part for stream, parts in busy.items() if stream != main for part in parts)
    return {
        "span_us": max(part.end_us for part in found),
        "busy_us": busy_us,
        "side_us": sum(end - start for start, end in side),
        "hidden_us": shared_us(side, busy[main]),
    }


def picture(title: str, found: Sequence[Interval]) -> str:
    """The time line as one HTML page. Each of the kernels that take longest has a colour and a line in the
    legend; every kernel's name and times show under the pointer."""
    streams = sorted({part.stream for part in found})
    span = max((part.end_us for part in found), default=1.0)
    total: dict[str, float] = {}
    for part in found:
        total[part.name] = total.get(part.name, 0.0) + part.end_us - part.start_us
    longest = sorted(total, key=lambda name: total[name], reverse=True)
    colours = dict(zip(longest, COLOURS, strict=False))
    boxes = []
    for part in found:
        x, width = part.start_us / span * WIDTH, max(1.0, (part.end_us - part.start_us) / span * WIDTH)
        y, colour = 30 + streams.index(part.stream) * ROW, colours.get(part.name, OTHERS)
        label = f"{html.escape(part.name)}: {part.start_us:.1f} to {part.end_us:.1f} µs"
        boxes.append(
            f'<rect x="{100 + x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 6}" fill="{colour}">'
            f"<title>{label}</title></rect>"
        )
    labels = [
        f'<text x="0" y="{30 + i * ROW + 18}">stream {stream}</text>' for i, stream in enumerate(streams)
    ]
    below = 50 + ROW * len(streams)
    legend = [
        f'<text x="100" y="{below + 20 * i}"><tspan fill="{colour}">■</tspan> '
        f"{total[name] / 1000:.3f} ms {html.escape(name[:NAME])}</text>"
        for i, (name, colour) in enumerate(colours.items())
    ]
    size = f'width="{WIDTH + 120}" height="{below + 20 * len(legend)}"'
    heading = f'<text x="0" y="18">{html.escape(title)}, {span / 1000:.3f} ms</text>'
    body = "\n".join([heading, *labels, *boxes, *legend])
    return f'<!doctype html><meta charset="utf-8"><svg {size} font-family="sans-serif">\n{body}\n</svg>\n'


def record(step: Callable[[], object]) -> list[Interval]:
    """Device work of one call, after two that warm up."""
    import torch

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda._sleep(HEAD_START)
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return intervals(json.loads(path.read_text()))


def attention_step(heads: int, tokens: int) -> Callable[[], object]:
    """A full step of HunyuanVideo's attention policy: column sums, selection, cache."""
    import torch

    from chipmunk_kernels.delta import attention
    from chipmunk_kernels.delta.policies import load_policy

    policy = load_policy("hunyuan-video").attention
    assert policy is not None
    q, k, v = (torch.randn(1, heads, tokens, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    chunks = max(1, heads // 6)
    attention.MASS_BYTES = 4 * chunks * -(-tokens // policy.group_size) * tokens
    delta = attention.AttentionDelta(policy)
    last = policy.schedule.first - 1

    def step() -> object:
        return [delta(q, k, v, number, keep=((tokens - 256, tokens),)) for number in (last - 1, last)][-1]

    return step


def mlp_step(tokens: int) -> Callable[[], object]:
    """A full step of FLUX's MLP policy: both products with biases, caches and group means."""
    import torch

    from chipmunk_kernels.delta.mlp import MlpDelta, MlpWeights
    from chipmunk_kernels.delta.policies import load_policy

    policy = load_policy("flux-dev").mlp
    assert policy is not None
    shapes = ((12288, 3072), (3072, 12288))
    up, down = (torch.randn(*s, dtype=torch.bfloat16, device="cuda") * s[1] ** -0.5 for s in shapes)
    up_bias, down_bias = (torch.randn(s[0], dtype=torch.bfloat16, device="cuda") for s in shapes)
    x = torch.randn(1, tokens, 3072, dtype=torch.bfloat16, device="cuda")
    delta = MlpDelta(policy)
    weights = MlpWeights(up, up_bias, down, down_bias, lambda: down.t().contiguous())
    last = policy.schedule.first - 1

    def step() -> object:
        delta.reset()
        return delta(x, weights, last, share=True)

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, write, and print one line for each step; returns the exit code."""
    parser = argparse.ArgumentParser(description="Show which kernels of a full step run beside which.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=34560, help="of the attention step")
    parser.add_argument("--mlp-tokens", type=int, default=3840)
    options = parser.parse_args(arguments)
    import torch

    from chipmunk_kernels.delta.side import Side

    if not torch.cuda.is_available():
        print("timeline: needs a CUDA device, torch sees none", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    with torch.no_grad():
        for label, side, make in (
            ("mlp", True, lambda: mlp_step(options.mlp_tokens)),
            ("attention-beside", True, lambda: attention_step(options.heads, options.tokens)),
            ("attention-in-place", False, lambda: attention_step(options.heads, options.tokens)),
        ):
            Side.enabled = side
            found = record(make())
            numbers = summary(found)
            report[label] = numbers | {"intervals": [asdict(part) for part in found]}
            (options.out / f"timeline-{label}.html").write_text(picture(label, found))
            print(
                f"{label:<20} {numbers['span_us']:10.1f} us, beside: {numbers['side_us']:.1f} us, "
                f"of which hidden {numbers['hidden_us']:.1f} us",
                flush=True,
            )
    (options.out / "timeline.json").write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
