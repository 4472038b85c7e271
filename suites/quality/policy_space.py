"""What the policy search may choose, and the policy that a choice stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from chipmunk_kernels.delta.policy import AttentionPolicy, MlpPolicy, Policy, Schedule

PATCHES: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": (),
    "4x4": ((4, 4),),
    "8x8": ((8, 8),),
    "8x8, 4x4": ((8, 8), (4, 4)),
    "16x8": ((16, 8),),
}
"""Token orders by name. A group of 128 queries is two 8×8 patches, or one of 16×8."""

FIRST = (1, 6)
EVERY = (0, 3, 4, 5, 6, 8, 10, 14)
GROUPS = (64, 128, 256)
DENSE_LAYERS = 3
KEEP = {"attention": (0.02, 0.5), "mlp": (0.08, 1.0)}
MLP_WORTH_IT = 0.7
"""Above this the MLP stays dense: one dimension without conditions, easier to learn than a switch."""


class Chooser(Protocol):
    """What of an Optuna trial is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def choose(trial: Chooser, name: str, layers: int) -> Policy:
    """A policy from a trial's choices. Both parts share `first` and `every`."""
    schedule = Schedule(
        first=trial.suggest_int("first", *FIRST), every=trial.suggest_categorical("every", EVERY)
    )
    attention = AttentionPolicy(
        keep=round(trial.suggest_float("attention_keep", *KEEP["attention"], log=True), 3),
        schedule=schedule,
        group_size=trial.suggest_categorical("attention_group", GROUPS),
        dense_layers=trial.suggest_int("dense_layers", 0, min(DENSE_LAYERS, layers - 1)),
        merge=trial.suggest_categorical("merge", ("delta", "lse")),
    )
    mlp_keep = round(trial.suggest_float("mlp_keep", *KEEP["mlp"], log=True), 3)
    mlp_group = trial.suggest_categorical("mlp_group", GROUPS)
    mlp = None
    if mlp_keep <= MLP_WORTH_IT:
        mlp = MlpPolicy(keep=mlp_keep, schedule=schedule, group_size=mlp_group)
    patch = PATCHES[trial.suggest_categorical("patch", tuple(PATCHES))]
    return Policy(name=name, attention=attention, mlp=mlp, patch=patch)


def choices_of(policy: Policy, layers: int) -> dict[str, Any] | None:
    """The choices that come nearest to `policy`, to begin a search from; None without an attention part."""
    attention, mlp = policy.attention, policy.mlp
    if attention is None:
        return None

    def clip(value: float, bounds: tuple[float, float]) -> float:
        return min(max(value, bounds[0]), bounds[1])

    def nearest(value: int, options: tuple[int, ...]) -> int:
        return min(options, key=lambda option: abs(option - value))

    patches = {patch: name for name, patch in PATCHES.items()}
    choices: dict[str, Any] = {
        "first": int(clip(attention.schedule.first, FIRST)),
        "every": nearest(attention.schedule.every, EVERY),
        "attention_keep": clip(attention.keep, KEEP["attention"]),
        "attention_group": nearest(attention.group_size, GROUPS),
        "dense_layers": min(attention.dense_layers, DENSE_LAYERS, layers - 1),
        "merge": attention.merge,
        "mlp_keep": clip(mlp.keep, (KEEP["mlp"][0], MLP_WORTH_IT)) if mlp is not None else KEEP["mlp"][1],
        "mlp_group": nearest(mlp.group_size, GROUPS) if mlp is not None else 128,
        "patch": patches.get(policy.patch, "none"),
    }
    return choices


def starting_points(policy: Policy, layers: int) -> list[dict[str, Any]]:
    """Where a search begins: the given policy, its other merge form, attention alone, and a careful one."""
    first = choices_of(policy, layers)
    if first is None:
        return []
    other = {**first, "merge": "lse" if first["merge"] == "delta" else "delta"}
    alone = {**first, "mlp_keep": KEEP["mlp"][1]}
    careful = replace(
        policy,
        attention=AttentionPolicy(keep=0.3, dense_layers=0, schedule=Schedule(first=3, every=5)),
        mlp=MlpPolicy(keep=0.5),
    )
    points = [first, other, alone, choices_of(careful, layers)]
    return [point for point in points if point is not None]
