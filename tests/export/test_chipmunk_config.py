"""`chipmunk-config.yml`: every key of the authors' shipped files, what is lost, and the text itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile
from tuner.export.chipmunk_config import FILE_NAME, export, family_of
from tuner.export.result import ExportError

# What the authors ship, as a policy: nothing in it is beyond their format.
FLUX = Policy(
    "flux-shipped",
    AttentionPolicy(keep=0.165, random=0.0, schedule=Schedule(2, 10), group_size=192, keep_text=False),
    MlpPolicy(keep=0.3, random=0.05, schedule=Schedule(1, 10), dense_layers=2, reselect_every=2),
)
HUNYUAN = Policy(
    "hunyuan-shipped",
    AttentionPolicy(keep=0.05, random=0.01, schedule=Schedule(2, 0, (10, 40)), group_size=192),
    None,
    patch=((4, 6, 8),),
)

# Key by key what the two shipped files hold. Facts of the public repository sandyresearch/chipmunk.
FLUX_SHIPPED: dict[str, Any] = {
    "mlp.is_enabled": True,
    "mlp.is_fp8": False,
    "mlp.top_keys": 0.3,
    "mlp.random_keys": 0.05,
    "mlp.full_step_every": 10,
    "mlp.block_mask_cache": 2,
    "mlp.first_n_dense_layers": 2,
    "mlp.counts_multiple_of": 256,
    "mlp.bm": 128,
    "mlp.mbm": 128,
    "patchify.is_enabled": True,
    "patchify.chunk_size_1": 8,
    "patchify.chunk_size_2": 4,
    "attn.is_enabled": True,
    "attn.top_keys": 0.165,
    "attn.full_step_every": 10,
    "attn.full_step_schedule": None,
    "attn.first_n_dense_layers": 2,
    "attn.should_compress_indices": False,
    "attn.counts_multiple_of": 112,
    "attn.pad_qkv_before_kernel": False,
    "attn.mbm": 192,
    "offloading.global_disable_offloading": True,
}
HUNYUAN_SHIPPED: dict[str, Any] = {
    "patchify.is_enabled": True,
    "mlp.is_enabled": False,
    "attn.is_enabled": True,
    "attn.top_keys": 0.05,
    "attn.random_keys": 0.01,
    "attn.local_voxels": 0,
    "attn.local_1d_window": 0,
    "attn.first_n_dense_layers": 2,
    "attn.recompute_mask": True,
    "attn.should_compress_indices": True,
    "attn.full_step_schedule": {0, 1, 10, 40},
    "attn.pad_qkv_before_kernel": True,
    "attn.counts_multiple_of": 128,
}
# Shipped keys that a policy decides differently, and why.
# attn.recompute_mask is false in the FLUX file: a policy chooses columns anew on each full step.
# step_caching.is_enabled is true in the HunyuanVideo file: a policy has no step cache.


def document(policy: Policy, **options: Any) -> dict[str, Any]:
    return yaml.safe_load(export(policy, **options).files[FILE_NAME])


def value(document: dict[str, Any], path: str) -> Any:
    section, key = path.split(".", 1)
    return document[section][key]


@pytest.mark.parametrize(("path", "expected"), FLUX_SHIPPED.items())
def test_every_key_of_the_shipped_flux_file(path: str, expected: Any) -> None:
    assert value(document(FLUX), path) == expected


@pytest.mark.parametrize(("path", "expected"), HUNYUAN_SHIPPED.items())
def test_every_key_of_the_shipped_hunyuan_file(path: str, expected: Any) -> None:
    assert value(document(HUNYUAN), path) == expected


def test_what_a_policy_decides_otherwise_than_the_shipped_files() -> None:
    assert document(FLUX)["attn"]["recompute_mask"] is True
    # The target skips steps unless told not to.
    assert document(FLUX)["step_caching"] == document(HUNYUAN)["step_caching"] == {"is_enabled": False}
    # HunyuanVideo's 41 GiB of caches go to the host as the target chooses.
    assert "offloading" not in document(HUNYUAN)


def test_the_shipped_plans_lose_nothing_but_what_the_target_does_its_own_way() -> None:
    (flux,) = export(FLUX).warnings
    assert flux.startswith("mlp.reselect_every")
    (hunyuan,) = export(HUNYUAN).warnings
    assert hunyuan.startswith("attention.random")


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        (replace(FLUX, attention=AttentionPolicy(merge="lse")), "attention.merge"),
        (replace(FLUX, attention=AttentionPolicy(group_size=128)), "attention.group_size"),
        (replace(FLUX, attention=AttentionPolicy(random=0.01)), "attention.random"),
        (replace(FLUX, attention=AttentionPolicy(keep_text=True)), "attention.keep_text"),
        (replace(FLUX, attention=AttentionPolicy(window=64)), "attention.window"),
        (replace(HUNYUAN, attention=AttentionPolicy(window=64)), "attention.window"),
        (replace(HUNYUAN, attention=AttentionPolicy(keep_text=False)), "attention.keep_text"),
        (replace(FLUX, attention=AttentionPolicy(schedule=Schedule(1, 10))), "attention.schedule"),
        (replace(FLUX, attention=AttentionPolicy(schedule=Schedule(3, 10))), "attention.schedule"),
        (replace(FLUX, mlp=MlpPolicy(schedule=Schedule(2, 10))), "mlp.schedule"),
        (replace(FLUX, mlp=MlpPolicy(schedule=Schedule(1, 10, (5,)))), "mlp.schedule"),
        (replace(FLUX, mlp=MlpPolicy(group_size=64)), "mlp.group_size"),
        (replace(FLUX, mlp=MlpPolicy(reselect_every=3)), "mlp.reselect_every"),
        (replace(FLUX, patch=((8, 4),)), "patch"),
        (replace(FLUX, patch=((8, 8), (3, 3))), "patch"),
        (replace(FLUX, patch=((16, 16),)), "patch"),
        (replace(HUNYUAN, patch=((2, 8, 8),)), "patch"),
        (replace(FLUX, seed=7), "seed"),
    ],
)
def test_what_cannot_be_expressed_is_named(policy: Policy, named: str) -> None:
    result = export(policy)
    assert any(warning.startswith(f"{named}: ") for warning in result.warnings), result.warnings
    header = [line for line in result.files[FILE_NAME].splitlines() if line.startswith("#")]
    assert all(any(warning in line for line in header) for warning in result.warnings)


def test_launch_settings_left_behind_are_named() -> None:
    entry = Entry(Problem("sparse_attention", 256, 256, 64), "triton", {"num_warps": 4})
    warnings = export(FLUX, profile=Profile(entries=(entry,))).warnings
    assert [line for line in warnings if line.startswith("kernels: 1 ")]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(2, 0), {0, 1}),
        (Schedule(3, 0, (20,)), {0, 1, 2, 20}),
        (Schedule(2, 10, (5,)), {0, 1, 5, 10, 20, 30, 40}),
        (Schedule(1, 25), {0, 1, 25}),  # without step 1 the target would have no columns to keep
        (Schedule(2, 0, (60,)), {0, 1, 60}),  # beyond these steps, yet part of the plan
    ],
)
def test_schedules_that_the_target_has_no_rule_for_become_sets(
    schedule: Schedule, expected: set[int]
) -> None:
    attention = replace(HUNYUAN.attention, schedule=schedule)
    written = document(replace(HUNYUAN, attention=attention))["attn"]
    assert written["full_step_schedule"] == expected
    assert "full_step_every" not in written


@pytest.mark.parametrize("steps", [8, 28, 50])
@pytest.mark.parametrize("schedule", [Schedule(2, 10), Schedule(3, 7, (12,)), Schedule(2, 0)])
def test_the_target_takes_the_same_full_steps(schedule: Schedule, steps: int) -> None:
    """By the target's rule: the set if there is one, else steps 0, 1 and every n-th."""
    attention = replace(FLUX.attention, schedule=schedule)
    written = document(replace(FLUX, attention=attention), steps=steps)["attn"]
    listed = written["full_step_schedule"]
    full = [
        step
        for step in range(steps)
        if (step in listed if listed is not None else step < 2 or step % written["full_step_every"] == 0)
    ]
    assert tuple(full) == schedule.full_steps(steps)


def test_an_mlp_that_is_never_refreshed() -> None:
    policy = replace(FLUX, mlp=MlpPolicy(schedule=Schedule(1, 0)))
    written = document(policy, steps=28)["mlp"]
    assert [step for step in range(28) if step % written["full_step_every"] == 0] == [0]
    assert not [line for line in export(policy, steps=28).warnings if line.startswith("mlp.schedule")]


def test_a_window_becomes_a_fraction_of_the_video() -> None:
    policy = replace(HUNYUAN, attention=replace(HUNYUAN.attention, window=500))
    fraction = document(policy, video_tokens=118800)["attn"]["local_1d_window"]
    assert int(fraction * 118800) == 192 + 2 * 500  # as the target computes it
    assert document(policy, video_tokens=100)["attn"]["local_1d_window"] == 1.0


def test_parts_that_stay_dense() -> None:
    written = document(Policy("dense", None, None, patch=()))
    assert written["attn"] == written["mlp"] == written["patchify"] == {"is_enabled": False}


@pytest.mark.parametrize(
    ("policy", "family"),
    [
        (FLUX, "image"),
        (HUNYUAN, "video"),
        (replace(FLUX, patch=()), "image"),
        (replace(HUNYUAN, patch=()), "video"),
    ],
)
def test_family(policy: Policy, family: str) -> None:
    assert family_of(policy) == family


def test_bad_numbers() -> None:
    with pytest.raises(ExportError, match="steps: expected at least 1"):
        export(FLUX, steps=0)
    with pytest.raises(ExportError, match="video_tokens: expected a positive"):
        export(HUNYUAN, video_tokens=0)


def test_the_text_itself() -> None:
    small = Policy("small", replace(HUNYUAN.attention, random=0.0), None, patch=())
    assert export(small).files[FILE_NAME] == (
        "# Policy small, video, 50 steps, exported by chipmunk-export --to chipmunk.\n"
        "\n"
        "steps: 50\n"
        "mlp:\n"
        "  is_enabled: false\n"
        "patchify:\n"
        "  is_enabled: false\n"
        "attn:\n"
        "  is_enabled: true\n"
        "  top_keys: 0.05\n"
        "  random_keys: 0.0\n"
        "  local_voxels: 0\n"
        "  local_1d_window: 0\n"
        "  first_n_dense_layers: 2\n"
        "  full_step_schedule: !!set\n"
        "    0: null\n"
        "    1: null\n"
        "    10: null\n"
        "    40: null\n"
        "  recompute_mask: true\n"
        "  should_compress_indices: true\n"
        "  counts_multiple_of: 128\n"
        "  pad_qkv_before_kernel: true\n"
        "  mbm: 192\n"
        "step_caching:\n"
        "  is_enabled: false\n"
    )
