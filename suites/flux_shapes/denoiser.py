"""Stage three: train transformer and text encoders by flow matching, small pictures first, by the clock."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suites.flux_shapes import flow
from suites.flux_shapes.autoencoder import decode, encode
from suites.flux_shapes.clock import Clock, Log
from suites.flux_shapes.drawing import draw
from suites.flux_shapes.models import TEXT_LENGTH, TOKEN_PIXELS, Denoiser, Parts
from suites.flux_shapes.scenes import Scenes, scene_batches


@dataclass(frozen=True)
class Task:
    """One kind of batch: picture side in pixels, pictures per batch, rotary position stride."""

    size: int
    batch: int
    stride: int

    @property
    def side(self) -> int:
        """Image tokens along one side."""
        return self.size // TOKEN_PIXELS


@dataclass(frozen=True)
class Stage:
    """A share of the training time for one task."""

    name: str
    share: float
    task: Task


STAGES = (
    Stage("128", 0.50, Task(128, 256, 4)),
    Stage("256", 0.25, Task(256, 96, 2)),
    Stage("512", 0.25, Task(512, 32, 1)),
)
"""Small pictures teach the captions many times faster. Their position stride makes them span the 64×64
positions of a 512-pixel picture, so layouts carry over; what is to be drawn where is learnt there, edges
after.
"""
FRESH_SHARE, MOST_REUSED = 0.25, 64
"""Share of batches drawn and encoded anew, and how many recent ones are drawn from again (with new noise and
times): drawing and encoding 8 million pixels costs a third of a training step.
"""


@dataclass(frozen=True)
class Recipe:
    """How the denoiser is optimised. The text encoders learn at `text_rate` of the transformer's rate.

    They know what captions say already (`text`): fast steps would only move what the transformer reads.
    """

    learning_rate: float = 1e-3
    text_rate: float = 0.2
    last_rate_share: float = 0.01
    warmup_steps: int = 300
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float = 0.999
    most_steps_per_stage: int = 10**9


class Ema:
    """An exponential moving average of a module's weights, kept as a module of its own."""

    def __init__(self, module: Denoiser, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._mine: list[Tensor] = list(self.module.parameters())
        self._theirs: list[Tensor] = list(module.parameters())
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move a step towards the weights; the first steps are longer, so that short runs have an average."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)


class DenoiserTrainer:
    """Owns the optimiser, the average and the batches of one run."""

    def __init__(self, parts: Parts, recipe: Recipe, seed: int, autocast: Any, log: Log) -> None:
        self.parts, self.recipe, self.log, self._autocast = parts, recipe, log, autocast
        self.master = parts.denoiser.train()
        self.device = next(self.master.parameters()).device
        # On a GPU the arithmetic runs on a bfloat16 copy; the optimiser and the average see float32.
        self.denoiser = copy.deepcopy(self.master).bfloat16() if self.device.type == "cuda" else self.master
        self.ema = Ema(self.master, recipe.ema)
        self._optimizer = self._make_optimizer()
        self._captioner = parts.captioner(self.device)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._dice, self._seed = random.Random(seed), seed
        self._rope: dict[Task, tuple[Tensor, Tensor]] = {}
        self._streams: dict[int, Iterator[Scenes]] = {}
        self._recent: dict[Task, list[tuple[Scenes, Tensor]]] = {}
        self.step = 0

    def _make_optimizer(self) -> torch.optim.AdamW:
        text = {id(p) for m in (self.master.t5, self.master.clip) for p in m.parameters()}
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for p in self.master.parameters():
            groups.setdefault((id(p) in text, p.ndim > 1), []).append(p)
        return torch.optim.AdamW(
            [
                {
                    "params": members,
                    "rate": self.recipe.text_rate if is_text else 1.0,
                    "weight_decay": self.recipe.weight_decay if is_matrix else 0.0,
                }
                for (is_text, is_matrix), members in groups.items()
            ],
            lr=0.0,
            betas=self.recipe.betas,
            fused=self.device.type == "cuda",
        )

    def _rotary(self, task: Task) -> tuple[Tensor, Tensor]:
        if task not in self._rope:
            self._rope[task] = flow.rotary(
                self.denoiser.transformer, task.side, TEXT_LENGTH, task.stride, self.device
            )
        return self._rope[task]

    def _scenes(self, batch: int) -> Scenes:
        if batch not in self._streams:
            self._streams[batch] = scene_batches(batch, self._seed + batch, self.device)
        return next(self._streams[batch])

    def _clean(self, task: Task) -> tuple[Scenes, Tensor]:
        """Scenes and their packed latents: a new batch, or one of the recent ones again."""
        recent = self._recent.setdefault(task, [])
        if len(recent) >= 8 and self._dice.random() >= FRESH_SHARE:
            return self._dice.choice(recent)
        scenes = self._scenes(task.batch)
        with self._autocast(), torch.no_grad():
            latents = flow.pack(encode(self.parts.vae, draw(scenes, task.size)).float())
        recent.append((scenes, latents))
        del recent[:-MOST_REUSED]
        return scenes, latents

    def loss(self, task: Task) -> Tensor:
        """Mean squared velocity error on one batch."""
        scenes, clean = self._clean(task)
        t = flow.random_times(len(clean), clean.shape[1], self._generator)
        noise = torch.randn(clean.shape, generator=self._generator, device=self.device)
        mixed = torch.lerp(clean, noise, t[:, None, None])
        text, pooled = self._read(self.denoiser, scenes)
        rope = self._rotary(task)
        guess = flow.velocity(self.denoiser.transformer, mixed.to(text.dtype), t, text, pooled, rope)
        return (guess.float() - (noise - clean)).square().mean()

    def _read(self, denoiser: Denoiser, scenes: Scenes) -> tuple[Tensor, Tensor]:
        """T5's states and CLIP's pooled state of the captions."""
        clip_ids, t5_ids = self._captioner(scenes, TEXT_LENGTH)
        return denoiser.t5(t5_ids)[0], denoiser.clip(clip_ids).pooler_output

    def sample(self, scenes: Scenes, task: Task, steps: int, seed: int) -> Tensor:
        """Pictures `(B, 3, size, size)` in [0, 1] of the captions, by the averaged weights; on the CPU."""
        channels = 4 * self.parts.vae.config.latent_channels
        generator = torch.Generator().manual_seed(seed)
        return self.draw_from(
            torch.randn(len(scenes), task.side**2, channels, generator=generator), scenes, task, steps
        )

    @torch.no_grad()
    def draw_from(self, noise: Tensor, scenes: Scenes, task: Task, steps: int) -> Tensor:
        """As `sample`, from given noise tokens `(B, side², 4C)`."""
        average, vae = self.ema.module, self.parts.vae
        text, pooled = self._read(average, scenes)
        rope = self._rotary(task)
        tokens = flow.sample(average.transformer, noise.to(self.device), steps, text, pooled, rope)
        return decode(vae, flow.unpack(tokens, task.side)).cpu()

    def train_step(self, task: Task, rate: float) -> Tensor:
        """One optimiser step at the transformer's rate `rate`; returns the loss, still on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss = self.loss(task)
        self._backward(loss)
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        self._optimizer.step()
        self._publish()
        self.ema.update()
        self.step += 1
        return loss.detach()

    def _backward(self, loss: Tensor) -> None:
        """Gradients of the loss, in float32 on the master weights."""
        self.denoiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.denoiser is not self.master:
            for mine, theirs in zip(self.master.parameters(), self.denoiser.parameters(), strict=True):
                mine.grad = None if theirs.grad is None else theirs.grad.float()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the master weights into the arithmetic's copy."""
        if self.denoiser is not self.master:
            torch._foreach_copy_(list(self.denoiser.parameters()), list(self.master.parameters()))

    def rate(self, progress: float, step: int) -> float:
        """Warm-up by steps, then a cosine over the share of the time used."""
        recipe = self.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        return recipe.learning_rate * warm * (recipe.last_rate_share + (1 - recipe.last_rate_share) * cosine)

    def rehearse(self, stages: tuple[Stage, ...]) -> None:
        """Forward and backward of every shape once, so that what cannot work fails early.

        Leaves no gradients. Random streams move on: train with another trainer.
        Raises FloatingPointError on gradients that are not finite.
        """
        for stage in stages:
            self.loss(stage.task).backward()
            grads = [p.grad for p in self.denoiser.parameters() if p.grad is not None]
            if not torch.stack([grad.isfinite().all() for grad in grads]).all():
                raise FloatingPointError(f"gradients are not finite at {stage.task}")
            self.denoiser.zero_grad(set_to_none=True)

    def run(
        self,
        stages: tuple[Stage, ...],
        until_s: float,
        clock: Clock,
        save: Callable[[str], None],
        save_every_s: float,
        after_stage: Callable[[Stage], None],
    ) -> None:
        """Train until the clock shows `until_s`, saving at stage ends and every `save_every_s`."""
        start, saved = clock.elapsed_s(), clock.elapsed_s()
        total, stage_end = max(until_s - start, 1e-6), start
        for stage in stages:
            stage_end += stage.share * total
            recent: list[Tensor] = []
            stage_first, rate = self.step, 0.0
            while (
                clock.elapsed_s() < stage_end and self.step - stage_first < self.recipe.most_steps_per_stage
            ):
                rate = self.rate((clock.elapsed_s() - start) / total, self.step)
                recent.append(self.train_step(stage.task, rate))
                if self.step % 10 == 0:
                    recent[-1].item()  # keeps the host near the device, so that the clock is true
                if self.step % 100 == 0:
                    self._report(stage, recent, rate)
                if clock.elapsed_s() - saved > save_every_s:
                    save(stage.name)
                    saved = clock.elapsed_s()
            self._report(stage, recent, rate)
            save(stage.name)
            after_stage(stage)
            saved = clock.elapsed_s()

    def _report(self, stage: Stage, recent: list[Tensor], rate: float) -> None:
        if not recent:
            return
        loss = torch.stack(recent).mean().item()
        recent.clear()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at step {self.step}; the last saved archive is still good"
            )
        self.log.add("denoiser", stage=stage.name, step=self.step, loss=loss, lr=rate)
