"""`chipmunk-run hunyuan` on a model of four layers, and the dense baseline that it is measured against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny() -> Any:
    from suites.end_to_end.hunyuan import hunyuan_subject

    subject, _ = hunyuan_subject(
        model=None,
        random_weights="tiny",
        size="64",
        frames=5,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
    )
    return subject


def test_the_mask_free_baseline_is_the_masked_model(tiny: Any) -> None:
    """Cutting padded text off gives what masking it gives, with no mask for any block's attention."""
    from suites.end_to_end.generate import generate

    inputs = tiny.inputs("x", 0)
    assert int(inputs["prompt_attention_mask"].sum()) < inputs["prompt_attention_mask"].numel(), (
        "some text is padded"
    )
    masked = generate(tiny.pipe, inputs, steps=2, seed=0).output
    seen: list[Any] = []
    blocks = [*tiny.pipe.transformer.transformer_blocks, *tiny.pipe.transformer.single_transformer_blocks]
    with tiny.dense():
        hooks = [
            block.register_forward_pre_hook(lambda module, args: seen.append(args[3])) for block in blocks
        ]
        free = generate(tiny.pipe, inputs, steps=2, seed=0).output
        for hook in hooks:
            hook.remove()
    assert seen == [None] * (2 * len(blocks))
    torch.testing.assert_close(free, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))
    again = generate(tiny.pipe, inputs, steps=2, seed=0).output
    assert torch.equal(again, masked), "outside the context the model is as it was"


def test_rows_of_different_length_are_refused(tiny: Any) -> None:
    from suites.end_to_end.hunyuan import mask_free

    inputs = tiny.inputs("x", 0)
    embeddings = inputs["prompt_embeds"].expand(2, -1, -1)
    mask = inputs["prompt_attention_mask"].repeat(2, 1)
    mask[1, 10:] = 0
    with mask_free(tiny.pipe.transformer), pytest.raises(ValueError, match="encoder_attention_mask"):
        tiny.pipe.transformer(
            hidden_states=torch.zeros(2, 4, 1, 8, 8),
            timestep=torch.zeros(2),
            encoder_hidden_states=embeddings,
            encoder_attention_mask=mask,
            pooled_projections=inputs["pooled_prompt_embeds"].expand(2, -1),
            guidance=torch.ones(2),
        )


def policy_file(path: Path, keep: float, first: int) -> Path:
    schedule = {"first": first, "every": 0}
    attention = {"keep": keep, "random": 0.0, "schedule": schedule, "group_size": 64, "dense_layers": 1}
    path.write_text(yaml.safe_dump({"name": "test", "attention": attention, "mlp": None, "patch": []}))
    return path


def test_a_sparse_run_of_four_steps(chipmunk_run: Run, tmp_path: Path) -> None:
    """The run that the full-size model gets: two full steps, two sparse ones, dense stopped after two."""
    policy = policy_file(tmp_path / "policy.yaml", keep=0.3, first=2)
    arguments = ["hunyuan", "--random-weights", "tiny", "--steps", 4, "--dense-steps", 2, "--policy", policy]
    code, out, err = chipmunk_run(*arguments, "--output", tmp_path / "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    row = record["prompts"][0]
    assert row["sparse"]["steps"] == ["full", "full", "sparse", "sparse"]
    assert 0.3 < row["attention_density"] < 1
    assert row["mlp_density"] is None
    assert record["settings"]["frames"] == 9
    assert "stayed dense" in out
    assert "padded text cut off" in out


def test_everything_kept_equals_the_dense_baseline(chipmunk_run: Run, tmp_path: Path) -> None:
    policy = policy_file(tmp_path / "policy.yaml", keep=1.0, first=1)
    code, out, err = chipmunk_run(
        *("hunyuan", "--random-weights", "tiny", "--steps", 3, "--policy", policy, "--dtype", "float32"),
        *("--output", tmp_path / "out", "--json"),
    )
    assert code == 0, err
    row = json.loads(out)["prompts"][0]
    assert row["sparse"]["steps"] == ["full", "sparse", "sparse"]
    assert row["attention_density"] == 1.0
    assert row["psnr_db"] > 80
