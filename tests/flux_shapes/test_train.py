"""A miniature run through every stage, what it leaves behind, and how it is installed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from suites.flux_shapes import assemble, train
from suites.flux_shapes.archive import read_parts, write_parts
from suites.flux_shapes.evaluation import sample
from suites.flux_shapes.folder import folder_bytes
from suites.flux_shapes.models import load
from suites.flux_shapes.plan import make_plan

MINIATURE = ["--miniature", "--device", "cpu", "--minutes", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a miniature run wrote."""
    out = tmp_path_factory.mktemp("trained")
    assert train.main(["--out", str(out), *MINIATURE]) == 0
    return out


def test_every_stage_runs_and_is_logged(trained: Path) -> None:
    rows = json.loads((trained / "log.json").read_text())
    events = [row["event"] for row in rows]
    after = events[events.index("rehearsed") :]
    order = ["latents", "text", "denoiser", "preview", "denoiser", "preview", "score"]
    assert [event for event in after if event in order] == order
    assert [row["step"] for row in rows if row["event"] == "denoiser"] == [3, 6]
    assert all(row["follow"][1] > 0 for row in rows if row["event"] in ("preview", "score"))
    assert (trained / "grid.png").stat().st_size > 0


def test_the_time_budget_runs_from_the_start_that_is_named(tmp_path: Path) -> None:
    """The command's own start, imports included; without one, the call: other tests may have run for long."""
    long_ago = time.monotonic() - 3600
    assert train.main(["--out", str(tmp_path), *MINIATURE], started=long_ago) == 0
    events = [row["event"] for row in json.loads((tmp_path / "log.json").read_text())]
    assert "denoiser" not in events[events.index("rehearsed") :]


def test_it_assembles_into_a_folder_that_loads(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("the card")
    assert assemble.main([str(trained), "--to", str(folder)]) == 0
    assert (folder / "README.md").read_text() == "the card"
    assert assemble.verify(folder) == folder_bytes(folder)
    again = tmp_path / "again"
    assert assemble.main([str(folder), "--to", str(again)]) == 0
    assert not (again / "README.md").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "model"]


def test_a_broken_model_replaces_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, broken = tmp_path / "model", tmp_path / "broken"
    assemble.assemble(trained, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    shutil.copytree(folder, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    assert assemble.main([str(broken), "--to", str(folder)]) == 1
    assert "nothing was replaced" in capsys.readouterr().err
    assert assemble.main([str(tmp_path / "nowhere"), "--to", str(folder)]) == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_too_large_a_model_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suites.flux_shapes.folder.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="model: expected at most"):
        assemble.assemble(trained, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_parts_carry_a_folder_byte_for_byte(tmp_path: Path) -> None:
    source, out, back = tmp_path / "source", tmp_path / "out", tmp_path / "back"
    (source / "deep").mkdir(parents=True)
    out.mkdir()
    content = bytes(range(256)) * 100
    (source / "deep" / "data").write_bytes(content)
    assert len(write_parts(source, out, part_bytes=1000)) > 10  # more than ten: ordered by number, not name
    read_parts(out, back)
    assert (back / "deep" / "data").read_bytes() == content


def test_resuming_keeps_all_parts_but_those_asked_fresh(trained: Path) -> None:
    def parts(*extra: str) -> dict[str, list[torch.Tensor]]:
        options = ["--out", "unused", *MINIATURE, *extra]
        built = train.initial_parts(make_plan(train.parser().parse_args(options)), torch.device("cpu"))
        modules = {"vae": built.vae, **dict(built.denoiser.named_children())}
        return {name: list(module.parameters()) for name, module in modules.items()}

    resume = ["--resume", str(trained)]
    whole, fresh = parts(*resume), parts()

    def kept(*extra: str) -> set[str]:
        got = parts(*resume, *extra)
        for name, values in got.items():  # every part is either the resumed or the fresh one, whole
            source = whole if values[0].equal(whole[name][0]) else fresh
            assert all(a.equal(b) for a, b in zip(values, source[name], strict=True))
        return {name for name, values in got.items() if values[0].equal(whole[name][0])}

    assert not any(whole[name][0].equal(fresh[name][0]) for name in whole)
    assert kept() == {"vae", "transformer", "t5", "clip"}
    assert kept("--fresh", "text") == {"vae", "transformer"}
    assert kept("--fresh", "all-but-vae") == {"vae"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--device", "cpu", "--stages", "100"], "--stages: expected some of 128,256,512, got 100"),
        (["--device", "cpu", "--fresh", "text"], "--fresh: expected --resume"),
    ],
)
def test_wrong_options_say_what_is_expected(
    extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--out", str(tmp_path), *extra]) == 2
    assert message in capsys.readouterr().out


def test_the_shipped_model_loads_and_draws() -> None:
    from diffusers import FluxPipeline

    assert assemble.verify(assemble.SHIPPED) <= 20_000_000
    pipe = FluxPipeline.from_pretrained(assemble.SHIPPED, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    captions = ["a large red circle on a blue background", "a large red circle on a white background"]
    blue, white = sample(pipe, captions, size=128, steps=6, seed=5, batch=2)
    assert blue.isfinite().all() and blue.shape == (3, 128, 128)
    # Same noise twice would be the same picture if captions did nothing; the border shows the background.
    assert blue[2, 0].mean() > blue[0, 0].mean() + 0.3
    assert white[:, 0].mean() > 0.8


def test_the_shipped_model_can_be_trained_further() -> None:
    parts = load(assemble.SHIPPED, "cpu")
    assert {p.dtype for p in parts.denoiser.parameters()} == {torch.float32}
    assert parts.vae.config.scaling_factor > 0
