"""A policy as `chipmunk-config.yml`, the configuration file of the method's authors.

Source of the key names and their meaning: the public repository sandyresearch/chipmunk, its configuration
module and the files shipped for FLUX, HunyuanVideo and Wan. What a reader of that code should know:

* Its image path (FLUX) orders tokens in square patches, keeps exactly the top columns and no text or random
  ones. Its video path (HunyuanVideo, Wan) orders tokens in fixed 4×6×8 voxels and always keeps the text.
* Attention steps 0, 1 and every `full_step_every`-th are full, or those of `full_step_schedule`, a YAML set,
  if there is one. MLP steps are full every `full_step_every`-th, with no other choice.
* Attention kernels are compiled for groups of 192 queries, MLP kernels for 128 tokens.
* Step caching is on unless the file says otherwise, so the file always says so.

Keys that a policy says nothing of (`offloading` of single tensors, `step_caching` steps) keep the target's
defaults; keys that its kernels prescribe (`mbm`, `counts_multiple_of`, …) are written as it ships them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import yaml

from tuner.export.result import Export, ExportError

if TYPE_CHECKING:
    from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy
    from chipmunk_kernels.profiles import Profile

FILE_NAME = "chipmunk-config.yml"
Family = Literal["image", "video"]

ATTENTION_GROUP = 192
MLP_GROUP = 128
VOXEL = (4, 6, 8)

# Constants of the target's attention kernels, as its FLUX and HunyuanVideo files ship them. The mask form
# goes with the family: random and always-kept columns exist only in a bit mask, which images do not get.
ATTENTION_CONSTANTS: dict[Family, dict[str, Any]] = {
    "image": {"should_compress_indices": False, "counts_multiple_of": 112, "pad_qkv_before_kernel": False},
    "video": {"should_compress_indices": True, "counts_multiple_of": 128, "pad_qkv_before_kernel": True},
}
MLP_CONSTANTS = {"counts_multiple_of": 256, "bm": MLP_GROUP, "mbm": MLP_GROUP}


def family_of(policy: Policy) -> Family:
    """Image or video: by the rank of the token order; without one by the MLP, dense in published video plans.

    (Its caches take over 200 GiB at video size.)
    """
    if policy.patch:
        return "video" if len(policy.patch[0]) == 3 else "image"
    return "image" if policy.mlp is not None else "video"


def export(
    policy: Policy,
    *,
    steps: int = 50,
    family: Family | None = None,
    video_tokens: int | None = None,
    profile: Profile | None = None,
) -> Export:
    """The policy as the text of a `chipmunk-config.yml`.

    Args:
        policy: the plan to express.
        steps: denoising steps of a generation; a schedule that the target has no rule for is listed up to it.
        family: which of the target's two paths will read the file; `family_of(policy)` if None.
        video_tokens: tokens of the video alone. The target states a local window as a fraction of them.
        profile: where the policy comes from; its launch settings are named as left behind.

    Raises:
        ExportError: fewer than one step or video token.
    """
    if steps < 1:
        raise ExportError(f"steps: expected at least 1 denoising step, got {steps}")
    if video_tokens is not None and video_tokens < 1:
        raise ExportError(f"video_tokens: expected a positive number of tokens, got {video_tokens}")
    family = family or family_of(policy)
    warnings: list[str] = []
    document: dict[str, Any] = {
        "steps": steps,
        "mlp": _mlp(policy.mlp, steps, warnings),
        "patchify": _patchify(policy.patch, family, warnings),
        "attn": _attention(policy.attention, steps, family, video_tokens, warnings),
        "step_caching": {"is_enabled": False},
    }
    if family == "image":
        # The target offloads caches to the host by default; ours stay on the GPU. The 41 GiB of a video
        # rarely fit there, so for video the target's own choice stands.
        document["offloading"] = {"global_disable_offloading": True}
    if profile is not None and profile.entries:
        warnings.append(
            f"kernels: {len(profile.entries)} launch settings stay behind; the target's kernels take none"
        )
    if policy.seed:
        warnings.append(f"seed: {policy.seed} is lost; the target draws its random columns unseeded")
    text = _header(policy.name, family, steps, warnings) + yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, default_flow_style=False
    )
    return Export({FILE_NAME: text}, tuple(warnings))


def _mlp(mlp: MlpPolicy | None, steps: int, warnings: list[str]) -> dict[str, Any]:
    if mlp is None:
        return {"is_enabled": False}
    period = mlp.schedule.every or steps
    ours, theirs = set(mlp.schedule.full_steps(steps)), set(range(0, steps, period))
    if ours != theirs:
        warnings.append(
            f"mlp.schedule: the target knows only every n-th step, written as {period}; "
            f"full here but sparse there: {_listed(ours - theirs)}"
        )
    if mlp.group_size != MLP_GROUP:
        warnings.append(
            f"mlp.group_size: {mlp.group_size} is written as {MLP_GROUP}, all that its kernels take"
        )
    if mlp.reselect_every > 1:
        warnings.append(
            f"mlp.reselect_every: the target reselects on steps that {mlp.reselect_every} divides, "
            "and on every step before the tenth"
        )
    return {
        "is_enabled": True,
        "is_fp8": False,
        "top_keys": mlp.keep,
        "random_keys": mlp.random,
        "full_step_every": period,
        "block_mask_cache": mlp.reselect_every,
        "first_n_dense_layers": mlp.dense_layers,
        **MLP_CONSTANTS,
    }


def _patchify(patch: tuple[tuple[int, ...], ...], family: Family, warnings: list[str]) -> dict[str, Any]:
    if not patch:
        return {"is_enabled": False}
    if family == "video":
        if patch != (VOXEL,):
            warnings.append(
                f"patch: {_sizes(patch)} is lost; the target orders video in {_sizes((VOXEL,))} voxels"
            )
        return {"is_enabled": True}
    outer, inner = patch[0][0], patch[1][0] if len(patch) > 1 else 1
    squares = ((outer, outer), (inner, inner))[: len(patch)]
    if patch != squares or outer % inner:
        warnings.append(
            f"patch: {_sizes(patch)} is lost, no patches are written; "
            "the target takes one or two square levels, the inner dividing the outer"
        )
        return {"is_enabled": False}
    if (outer, inner) != (8, 4):
        warnings.append(
            f"patch: {_sizes(patch)} needs care; the target takes 8x8, 4x4 at import, before it reads files"
        )
    return {"is_enabled": True, "chunk_size_1": outer, "chunk_size_2": inner}


def _attention(
    attention: AttentionPolicy | None,
    steps: int,
    family: Family,
    video_tokens: int | None,
    warnings: list[str],
) -> dict[str, Any]:
    if attention is None:
        return {"is_enabled": False}
    if attention.group_size != ATTENTION_GROUP:
        warnings.append(
            f"attention.group_size: {attention.group_size} is written as {ATTENTION_GROUP}, "
            "all that the target's kernels take"
        )
    if attention.merge != "delta":
        warnings.append(
            f"attention.merge: '{attention.merge}' is lost; the target has 'delta', dense minus selected"
        )
    _name_extras(attention, family, warnings)
    return {
        "is_enabled": True,
        "top_keys": attention.keep,
        "random_keys": attention.random,
        "local_voxels": 0,
        "local_1d_window": _window(attention, family, video_tokens, warnings),
        "first_n_dense_layers": attention.dense_layers,
        **_attention_schedule(attention, steps, warnings),
        # A policy's full steps always choose columns anew.
        "recompute_mask": True,
        **ATTENTION_CONSTANTS[family],
        "mbm": ATTENTION_GROUP,
    }


def _name_extras(attention: AttentionPolicy, family: Family, warnings: list[str]) -> None:
    """Always-kept and random columns, which the target's two paths treat each in its own way."""
    if family == "image":
        if attention.keep_text:
            warnings.append(
                "attention.keep_text: true is lost; for images the target keeps text only if it scores"
            )
        if attention.random:
            warnings.append(
                f"attention.random: {attention.random:g} has no effect there; for images it draws none"
            )
        return
    if not attention.keep_text:
        warnings.append("attention.keep_text: false is lost; the target's video path always keeps text")
    if attention.random:
        warnings.append(
            f"attention.random: {attention.random:g} is drawn once a run by the target, "
            "which adds a fixed 1 % of its own at each full step"
        )


def _window(
    attention: AttentionPolicy, family: Family, video_tokens: int | None, warnings: list[str]
) -> float | int:
    """The target's window: a fraction of the video tokens, centred on the group; ours widens the group."""
    if not attention.window:
        return 0
    if family == "image":
        warnings.append(f"attention.window: {attention.window} is lost; the target has none for images")
        return 0
    if video_tokens is None:
        warnings.append(
            f"attention.window: {attention.window} is lost; the target wants a fraction of the video tokens: "
            "give their number with --video-tokens"
        )
        return 0
    width = ATTENTION_GROUP + 2 * attention.window
    # Half a token more, because the target truncates the product.
    return min(1.0, round((width + 0.5) / video_tokens, 9))


def _attention_schedule(attention: AttentionPolicy, steps: int, warnings: list[str]) -> dict[str, Any]:
    schedule = attention.schedule
    if schedule.first == 2 and schedule.every > 0 and not schedule.also:
        return {"full_step_every": schedule.every, "full_step_schedule": None}
    full = {*schedule.full_steps(steps), *schedule.also}
    if 1 not in full:
        full.add(1)
        warnings.append(
            "attention.schedule: step 1 is written as full; the target needs it to choose columns"
        )
    if schedule.every > 0:
        warnings.append(f"attention.schedule: listed for {steps} steps; for others export again with --steps")
    return {"full_step_schedule": full}


def _header(name: str, family: Family, steps: int, warnings: list[str]) -> str:
    lines = [f"Policy {name}, {family}, {steps} steps, exported by chipmunk-export --to chipmunk."]
    if warnings:
        lines += ["What this format cannot express:", *(f"  {warning}" for warning in warnings)]
    return "".join(f"# {line}\n" for line in lines) + "\n"


def _listed(steps: set[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


def _sizes(patch: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, level)) for level in patch)


class _Dumper(yaml.SafeDumper):
    """Writes a Python set as a sorted `!!set`, which every YAML 1.1 loader reads back as a set."""

    def represent_sorted_set(self, steps: set[int]) -> yaml.Node:
        return self.represent_mapping("tag:yaml.org,2002:set", [(step, None) for step in sorted(steps)])

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(set, _Dumper.represent_sorted_set)
