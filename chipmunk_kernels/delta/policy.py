"""Policy: the portable, per-model sparsity plan. What to keep, when to refresh, what stays dense.

A policy knows nothing of a GPU; how to run its kernels fast is the profile's part. Published plans: arXiv
2506.03275, section 5 and the authors' shipped configurations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Merge = Literal["delta", "lse"]


@dataclass(frozen=True)
class Schedule:
    """Which denoising steps are full (dense, refresh the caches); all others are sparse.

    Attributes:
        first: the leading steps `0 … first-1` are full.
        every: every `every`-th step is full too; 0 for none.
        also: further full steps, by number.
    """

    first: int = 2
    every: int = 10
    also: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError(f"schedule.first: the first step must be full, got {self.first}")
        if self.every < 0:
            raise ValueError(f"schedule.every: expected 0 (never) or a positive period, got {self.every}")
        object.__setattr__(self, "also", tuple(self.also))

    def is_full(self, step: int) -> bool:
        return step < self.first or (self.every > 0 and step % self.every == 0) or step in self.also

    def last_full(self, step: int) -> int:
        """The latest full step up to and including `step`."""
        return next(past for past in range(step, -1, -1) if self.is_full(past))

    def full_steps(self, steps: int) -> tuple[int, ...]:
        return tuple(step for step in range(steps) if self.is_full(step))


@dataclass(frozen=True)
class AttentionPolicy:
    """Column-sparse deltas for attention.

    Attributes:
        keep: fraction of the columns kept by score, on top of the always-kept ones.
        random: fraction kept at random besides.
        schedule: full steps.
        group_size: queries that share a selection.
        dense_layers: the first layers that stay dense on every step.
        merge: `delta` caches dense minus selected; `lse` caches the unselected part as a partial softmax.
        keep_text: always keep the text columns.
        window: also keep columns within this many positions of the group's own rows; 0 for none.
    """

    keep: float = 0.165
    random: float = 0.01
    schedule: Schedule = field(default_factory=Schedule)
    group_size: int = 128
    dense_layers: int = 2
    merge: Merge = "delta"
    keep_text: bool = True
    window: int = 0

    def __post_init__(self) -> None:
        _check_fractions(self, "attention")
        if self.merge not in ("delta", "lse"):
            raise ValueError(f"attention.merge: expected 'delta' or 'lse', got {self.merge!r}")


@dataclass(frozen=True)
class MlpPolicy:
    """Column-sparse deltas for the MLP.

    Attributes:
        keep: fraction of hidden neurons kept by estimated change.
        random: fraction kept at random besides.
        schedule: full steps.
        group_size: tokens that share a selection.
        dense_layers: the first layers that stay dense on every step.
        reselect_every: choose columns anew on every n-th sparse step (1: on each, the better quality).
        text_stream: also the text stream's own MLPs (FLUX's double blocks). Off by default: at 1280×768
            they are 4 % of the MLP work, and their few tokens steer the whole picture.
    """

    keep: float = 0.30
    random: float = 0.05
    schedule: Schedule = field(default_factory=lambda: Schedule(first=1))
    group_size: int = 128
    dense_layers: int = 0
    reselect_every: int = 1
    text_stream: bool = False

    def __post_init__(self) -> None:
        _check_fractions(self, "mlp")
        if self.reselect_every < 1:
            raise ValueError(f"mlp.reselect_every: expected 1 or more steps, got {self.reselect_every}")


@dataclass(frozen=True)
class Policy:
    """A model's whole plan; `None` for a part that stays dense.

    Attributes:
        name: how a profile and the command line call it.
        attention: the attention part.
        mlp: the MLP part.
        patch: side lengths, in tokens, of the blocks that the reorder makes consecutive, outermost first
            (`((8, 8), (4, 4))` for FLUX: 8×8 patches, 4×4 inside); empty to keep the model's order.
        seed: seeds the random extras.
    """

    name: str
    attention: AttentionPolicy | None = field(default_factory=AttentionPolicy)
    mlp: MlpPolicy | None = field(default_factory=MlpPolicy)
    patch: tuple[tuple[int, ...], ...] = ((8, 8), (4, 4))
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, as a profile stores them."""
        return _plain(asdict(self))

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Policy:
        """A policy from a profile or a YAML file. Raises ValueError naming unknown fields and bad values."""
        values = dict(values)
        for key, kind in (("attention", AttentionPolicy), ("mlp", MlpPolicy)):
            part = values.get(key)
            if part is not None and not isinstance(part, kind):
                part = dict(_mapping(part, key))
                if not isinstance(part.get("schedule", Schedule()), Schedule):
                    where = f"{key}.schedule"
                    part["schedule"] = _build(Schedule, _mapping(part["schedule"], where), where)
                values[key] = _build(kind, part, key)
        if "patch" in values:
            values["patch"] = tuple(tuple(level) for level in values["patch"])
        return _build(cls, values, "policy")


def _check_fractions(part: AttentionPolicy | MlpPolicy, name: str) -> None:
    for key in ("keep", "random"):
        value = getattr(part, key)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}.{key}: expected a fraction from 0 to 1, got {value!r}")
    if part.group_size < 1:
        raise ValueError(f"{name}.group_size: expected a positive number of rows, got {part.group_size}")
    if part.dense_layers < 0:
        raise ValueError(f"{name}.dense_layers: expected 0 or more, got {part.dense_layers}")


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown}; expected among {sorted(known)}")
    return kind(**values)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a mapping, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
