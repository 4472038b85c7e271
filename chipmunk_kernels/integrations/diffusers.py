"""Put the method into a diffusers model and take it out again.

    handle = apply_chipmunk(pipe, load_policy("flux-dev"))
    image = pipe(prompt, ...).images[0]
    print(handle.report().as_dict())
    remove_chipmunk(pipe)

All state hangs on the transformer; two models in one process know nothing of each other. A generation ends
when the pipeline says so (it resets stateful hooks), and a new one is noticed even if the last was cut
short: see `chipmunk_kernels.delta.clock`. Guidance branches come from the pipeline's `cache_context`.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

try:
    from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel
    from diffusers.hooks import HookRegistry, ModelHook
    from diffusers.hooks.hooks import BaseState, StateManager
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ModuleNotFoundError(
        "apply_chipmunk needs diffusers: pip install 'chipmunk-kernels[run]'", name="diffusers"
    ) from error
from torch import Tensor, nn

from chipmunk_kernels.delta.engine import Engine
from chipmunk_kernels.delta.policy import Policy
from chipmunk_kernels.delta.report import Report
from chipmunk_kernels.integrations.flux import FluxAdapter
from chipmunk_kernels.integrations.hunyuan import HunyuanAdapter
from chipmunk_kernels.integrations.patches import Patches

if TYPE_CHECKING:
    from chipmunk_kernels.profiles import Profile

ADAPTERS: tuple[tuple[type, Any], ...] = (
    (FluxTransformer2DModel, FluxAdapter),
    (HunyuanVideoTransformer3DModel, HunyuanAdapter),
)
_CHILD = "chipmunk"


class Handle:
    """The method in one transformer.

    Attributes:
        transformer: the model.
        policy: its plan.
        engine: its state.
    """

    def __init__(self, transformer: Any, pipe: Any, policy: Policy, profile: Profile | None) -> None:
        self.transformer = transformer
        self.policy = policy
        self.engine = Engine(policy, profile)
        self._pipe = pipe
        self._patches = Patches()
        self._names = list(inspect.signature(transformer.forward).parameters)
        try:
            self._attach()
        except BaseException:
            self._patches.undo()
            raise

    def report(self) -> Report:
        """What the last generation did, or the one in progress. Syncs: call it after the run."""
        displaced = self._patches.displaced()
        for line in self._adapter.unhooked:
            self.engine.notes[f"{line}: left as it is"] = None
        if displaced:
            self.engine.notes[f"{displaced} attention processors were replaced after apply_chipmunk"] = None
        return self.engine.report()

    def reset(self) -> None:
        """Drop caches, step clock and counts: the next forward begins a generation."""
        self.engine.reset()

    def remove(self) -> None:
        """Take the method out: the original processors, forwards and modules are back."""
        self._patches.undo()
        self.engine.reset()

    def _attach(self) -> None:
        kind = next(adapter for model, adapter in ADAPTERS if isinstance(self.transformer, model))
        self._adapter = kind(self.transformer, self.engine, self._patches)
        self._hook = _GenerationHook(self.engine)
        self._attach_child()
        before = self.transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.transformer.register_forward_hook(self._after)
        self._patches.also(before.remove)
        self._patches.also(after.remove)

    def _attach_child(self) -> None:
        """A child module without parameters that carries the hook and this handle.

        diffusers tells context and end of generation to hooks of any child. Wrapping the root's own forward
        instead would not survive model offloading, which swaps that forward after every generation.
        """
        child = nn.Module()
        child.__dict__["handle"] = (
            self  # not through nn.Module's bookkeeping: the handle refers back to the model
        )
        self.transformer.add_module(_CHILD, child)
        HookRegistry.check_if_exists_or_initialize(child).register_hook(self._hook, _CHILD)
        self._refresh_registries()
        self._patches.also(self._detach_child)

    def _detach_child(self) -> None:
        del self.transformer._modules[_CHILD]
        self._refresh_registries()

    def _refresh_registries(self) -> None:
        """diffusers 0.42 keeps a list of the children that carry hooks; older versions walk the tree each
        time.
        """
        registry = HookRegistry.check_if_exists_or_initialize(self.transformer)
        if hasattr(registry, "invalidate_child_registries_cache"):
            registry.invalidate_child_registries_cache()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        marker = self._marker()
        branch = self._hook.branch()
        fresh = self.engine.begin(
            self._adapter.signature(inputs),
            branch=branch,
            timestep=_timestep(inputs.get("timestep"), must=marker is None or branch is None),
            marker=marker,
        )
        return (), self._adapter.enter(inputs, fresh)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        output = self._adapter.leave(output)
        self.engine.end()
        return output

    def _marker(self) -> Any:
        """The running pipeline's list of timesteps, which is a new tensor in every generation; None outside
        one.
        """
        if self._pipe is None or getattr(self._pipe, "_current_timestep", None) is None:
            return None
        return getattr(self._pipe.scheduler, "timesteps", None)


class _Branch(BaseState):
    """One guidance branch; diffusers makes one per context name."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to reset: only its identity is used."""


class _GenerationHook(ModelHook):
    """Hears from diffusers which guidance branch runs, and when a generation ends."""

    _is_stateful = True

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self._branches = StateManager(_Branch)  # type: ignore[arg-type]

    def branch(self) -> Hashable:
        """The branch of the context in force; None outside any."""
        try:
            return id(self._branches.get_state())
        except ValueError:  # no context is set: the caller is not a pipeline
            return None

    def reset_state(self, module: nn.Module) -> nn.Module:
        """The pipeline's generation is over."""
        self._branches.reset()
        self._engine.finish()
        return module


def apply_chipmunk(pipe_or_transformer: Any, policy: Policy, profile: Profile | None = None) -> Handle:
    """Run a FLUX or HunyuanVideo transformer column-sparse from now on.

    Args:
        pipe_or_transformer: a diffusers pipeline or its transformer. With the pipeline, a new generation is
            noticed without reading the timestep from the device on every step.
        policy: what to keep, when to refresh, what stays dense.
        profile: tuned kernels to use; by default what `chipmunk_kernels.profiles.find` finds for the device.

    Raises:
        ValueError: not a supported model, or a policy that does not fit it.
        RuntimeError: it is already applied.
    """
    transformer, pipe = _transformer(pipe_or_transformer)
    if not isinstance(policy, Policy):
        raise ValueError(
            f"policy: expected a Policy (chipmunk_kernels.delta.policies.load_policy gives one by name), "
            f"got {type(policy).__name__}"
        )
    if _handle(transformer) is not None:
        raise RuntimeError("apply_chipmunk: already applied to this transformer; call remove_chipmunk first")
    axes = 2 if isinstance(transformer, FluxTransformer2DModel) else 3
    for level in policy.patch:
        if len(level) != axes or min(level) < 1:
            raise ValueError(
                f"policy.patch: expected {axes} positive block sides for {type(transformer).__name__}, "
                f"got {tuple(level)}"
            )
    return Handle(transformer, pipe, policy, profile)


def remove_chipmunk(pipe_or_transformer: Any) -> None:
    """Give a transformer its original processors, forwards and modules back. Does nothing where none was
    applied.
    """
    transformer, _ = _transformer(pipe_or_transformer)
    handle = _handle(transformer)
    if handle is not None:
        handle.remove()


def _transformer(pipe_or_transformer: Any) -> tuple[Any, Any]:
    """The transformer, out of `torch.compile`'s wrapper, and its pipeline if that was given."""
    is_module = isinstance(pipe_or_transformer, nn.Module)
    pipe = None if is_module else pipe_or_transformer
    transformer = pipe_or_transformer if is_module else getattr(pipe_or_transformer, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)
    if not isinstance(transformer, tuple(model for model, _ in ADAPTERS)):
        names = ", ".join(model.__name__ for model, _ in ADAPTERS)
        found = type(transformer if transformer is not None else pipe_or_transformer).__name__
        raise ValueError(f"pipe_or_transformer: expected one of {names}, or a pipeline with one; got {found}")
    return transformer, pipe


def _handle(transformer: Any) -> Handle | None:
    child = transformer._modules.get(_CHILD)
    return None if child is None else child.__dict__["handle"]


def _timestep(timestep: Any, must: bool) -> float | None:
    """The forward's timestep; None where reading it would wait for the device and need not be."""
    if not isinstance(timestep, Tensor):
        return None if timestep is None else float(timestep)
    if timestep.device.type != "cpu" and not must:
        return None
    return float(timestep.reshape(-1)[0])
