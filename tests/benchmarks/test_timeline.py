"""The time line's arithmetic and picture; recording needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from suites.benchmarks import timeline
from suites.benchmarks.timeline import Interval, intervals, merged, picture, summary


def event(name: str, stream: int, start: float, duration: float, cat: str = "kernel") -> dict[str, object]:
    return {"name": name, "cat": cat, "ts": start, "dur": duration, "args": {"stream": stream}}


TRACE = {
    "traceEvents": [
        event("gemm<a>", 7, 1000.0, 50.0),
        event("copy", 13, 1010.0, 20.0, "gpu_memcpy"),
        event("sums", 13, 1025.0, 45.0),
        {"name": "launch", "cat": "cuda_runtime", "ts": 900.0, "dur": 5.0, "args": {}},
        event("gemm<a>", 7, 1050.0, 10.0),
    ]
}


def test_device_work_in_order_from_zero() -> None:
    found = intervals(TRACE)
    assert [(part.name, part.stream, part.start_us, part.end_us) for part in found] == [
        ("gemm<a>", 7, 0.0, 50.0),
        ("copy", 13, 10.0, 30.0),
        ("sums", 13, 25.0, 70.0),
        ("gemm<a>", 7, 50.0, 60.0),
    ]
    assert intervals({"traceEvents": []}) == []


def test_union_of_intervals() -> None:
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def test_what_was_hidden() -> None:
    """The side worked from 10 to 70; the main stream, without a gap, until 60."""
    found = summary(intervals(TRACE))
    assert found == {"span_us": 70.0, "busy_us": {7: 60.0, 13: 60.0}, "side_us": 60.0, "hidden_us": 50.0}
    alone = summary([Interval("gemm", 7, 0.0, 5.0), Interval("gemm", 7, 6.0, 9.0)])
    assert alone == {"span_us": 9.0, "busy_us": {7: 8.0}, "side_us": 0, "hidden_us": 0}
    assert summary([])["span_us"] == 0.0


def test_the_picture_shows_every_kernel() -> None:
    page = picture("a & b", intervals(TRACE))
    assert (
        page.count("<rect") == 4 and "stream 13" in page and "gemm&lt;a&gt;" in page and "a &amp; b" in page
    )
    assert page.count("</tspan>") == 3 and "0.060 ms gemm&lt;a&gt;" in page


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert timeline.main(["--out", str(tmp_path)]) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_recording(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--heads", "6", "--tokens", "4096", "--mlp-tokens", "1024"]
    assert timeline.main(options) == 0
    report = json.loads((tmp_path / "timeline.json").read_text())
    assert report["attention-beside"]["side_us"] > 0
    assert report["attention-in-place"]["side_us"] == report["mlp"]["side_us"] == 0
    assert (tmp_path / "timeline-attention-beside.html").read_text().count("<rect") > 3
