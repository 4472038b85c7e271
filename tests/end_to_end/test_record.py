"""The record on disk: strict JSON, whole after every write, never overwritten by another run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from suites.end_to_end.errors import UsageError
from suites.end_to_end.record import Record, plain, write_atomically


def test_records_are_strict_json(tmp_path: Path) -> None:
    record = Record(tmp_path, {"size": (1, 2)})
    record.add({"prompt": "p", "psnr_db": math.inf, "ssim": math.nan, "times": (1.0, 2.0)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(record.path.read_text(), parse_constant=refuse)
    assert data["prompts"] == [{"prompt": "p", "psnr_db": None, "ssim": None, "times": [1.0, 2.0]}]
    assert Record(tmp_path, {"size": (1, 2)}).finished("p"), "tuples and lists are the same settings"


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    record = Record(tmp_path, {})
    for prompt in ("a", "b", "c"):
        record.add({"prompt": prompt})
    assert [row["prompt"] for row in record.rows(["c", "x", "a"])] == ["c", "a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not readable"),
        ("[]", "not readable"),
        ('{"settings": {}}', "not readable"),
        ('{"schema": 99, "settings": {}, "prompts": []}', "schema 99"),
    ],
)
def test_a_file_that_is_no_record_is_left_alone(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        Record(tmp_path, {})
    assert path.read_text() == content
    assert Record(tmp_path, {}, fresh=True).data["prompts"] == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_plain_keeps_what_json_can_hold() -> None:
    assert plain({"a": (1, [None, "x"], {"b": -math.inf}), 2: True}) == {
        "a": [1, [None, "x"], {"b": None}],
        "2": True,
    }
