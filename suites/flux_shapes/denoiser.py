"""Stage two: train transformer and text encoders by flow matching, small pictures first, by the clock."""

from __future__ import annotations

import copy
import math
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suites.flux_shapes import flow
from suites.flux_shapes.autoencoder import encode
from suites.flux_shapes.clock import Clock, Log
from suites.flux_shapes.drawing import draw
from suites.flux_shapes.models import TOKEN_PIXELS, Captioner, Denoiser, Parts
from suites.flux_shapes.scenes import Scenes, scene_batches


@dataclass(frozen=True)
class Task:
    """One kind of batch: picture side in pixels, pictures per batch, rotary position stride."""

    size: int
    batch: int
    stride: int

    @property
    def side(self) -> int:
        return self.size // TOKEN_PIXELS


@dataclass(frozen=True)
class Stage:
    """A share of the training time, and the tasks drawn in it by weight."""

    name: str
    share: float
    tasks: tuple[tuple[Task, float], ...]


STAGES = (
    Stage("128", 0.38, ((Task(128, 256, 4), 1.0),)),
    Stage("256", 0.30, ((Task(256, 96, 2), 1.0),)),
    Stage("512", 0.32, ((Task(512, 32, 1), 1.0),)),
)
"""Small pictures teach the captions many times faster. Their position stride makes them span the 64×64 positions of
a 512-pixel picture, so layouts carry over."""
TEXT_LENGTH = 64
"""Padded T5 length: `max_sequence_length` in the pipeline. One length keeps every shape static for the compiler."""
FRESH_SHARE, MOST_REUSED = 0.25, 64
"""Share of batches drawn and encoded anew, and how many recent ones are drawn from again (with new noise and times):
drawing and encoding 8 million pixels costs a third of a training step."""


@dataclass(frozen=True)
class Recipe:
    """How the denoiser is optimised."""

    learning_rate: float = 1e-3
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
        self._mine, self._theirs = list(self.module.parameters()), list(module.parameters())
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)


class DenoiserTrainer:
    """Owns the optimiser, the average and the batches of one run."""

    def __init__(
        self, parts: Parts, recipe: Recipe, seed: int, autocast: Any, compiled: bool, log: Log
    ) -> None:
        self.parts, self.recipe, self.log, self._autocast = parts, recipe, log, autocast
        self.master = parts.denoiser.train()
        self.device = next(self.master.parameters()).device
        # On a GPU the arithmetic runs on a bfloat16 copy; the optimiser and the average see float32.
        self.denoiser = copy.deepcopy(self.master).bfloat16() if self.device.type == "cuda" else self.master
        self.ema = Ema(self.master, recipe.ema)
        self._optimizer = self._make_optimizer()
        self._captioner = Captioner(parts.clip_tokenizer, parts.t5_tokenizer, self.device)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._dice, self._seed = random.Random(seed), seed
        self._rope: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._streams: dict[int, Iterator[Scenes]] = {}
        self._recent: dict[Task, list[tuple[Scenes, Tensor]]] = {}
        self.step, self._fallbacks = 0, 0
        if compiled:
            self._compile()

    def _make_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.master.parameters() if p.ndim > 1]
        vectors = [p for p in self.master.parameters() if p.ndim <= 1]
        return torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=self.recipe.betas,
            weight_decay=self.recipe.weight_decay,
            fused=self.device.type == "cuda",
        )

    def _compile(self) -> None:
        transformer = self.denoiser.transformer
        torch._dynamo.config.cache_size_limit = 64
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            block.compile(dynamic=False)

    def _fall_back(self, error: Exception) -> None:
        """Once, without compiled blocks; then there is nothing left to try."""
        trace = traceback.format_exc()
        self.log.add("fallback", number=self._fallbacks, reason=repr(error)[:500], trace=trace[-3000:])
        self._fallbacks += 1
        if self._fallbacks > 1:
            raise error
        torch._dynamo.reset()
        for module in self.denoiser.transformer.modules():
            module._compiled_call_impl = None

    def _rotary(self, task: Task, text_length: int) -> tuple[Tensor, Tensor]:
        key = (task.side, text_length, task.stride)
        if key not in self._rope:
            self._rope[key] = flow.rotary(
                self.denoiser.transformer, task.side, text_length, task.stride, self.device
            )
        return self._rope[key]

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
        t = flow.random_times(task.batch, clean.shape[1], self._generator)
        noise = torch.randn(clean.shape, generator=self._generator, device=self.device)
        mixed = torch.lerp(clean, noise, t[:, None, None])
        clip_ids, t5_ids = self._captioner(scenes, TEXT_LENGTH)
        denoiser = self.denoiser
        text = denoiser.t5(t5_ids)[0]
        pooled = denoiser.clip(clip_ids).pooler_output
        rope = self._rotary(task, TEXT_LENGTH)
        guess = flow.velocity(denoiser.transformer, mixed.to(text.dtype), t, text, pooled, rope)
        return (guess.float() - (noise - clean)).square().mean()

    def train_step(self, task: Task, rate: float) -> Tensor:
        """One optimiser step at learning rate `rate`; returns the loss, still on the device."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
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

    def rate(self, progress: float, steps_in_run: int) -> float:
        """Warm-up by steps, then a cosine over the share of the time used."""
        recipe = self.recipe
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        warm = min(1.0, (steps_in_run + 1) / recipe.warmup_steps)
        return recipe.learning_rate * warm * (recipe.last_rate_share + (1 - recipe.last_rate_share) * cosine)

    def rehearse(self, stages: tuple[Stage, ...]) -> None:
        """Run forward and backward of every shape once before the time counts: compiles, and fails early.

        Weights, average and random streams that matter to training stay as they were.
        """
        for task in sorted({task for stage in stages for task, _ in stage.tasks}, key=lambda t: t.size):
            self._try(task)
        self.denoiser.zero_grad(set_to_none=True)
        self._streams.clear()
        self._recent.clear()
        self._dice.seed(self._seed)
        self._generator.manual_seed(self._seed)

    def _try(self, task: Task) -> None:
        """One forward and backward, with finite gradients, falling back as far as needed."""
        while True:
            try:
                self.denoiser.zero_grad(set_to_none=True)
                self.loss(task).backward()
                grads = [p.grad for p in self.denoiser.parameters() if p.grad is not None]
                if not torch.stack([grad.isfinite().all() for grad in grads]).all():
                    raise FloatingPointError(f"gradients are not finite at {task}")
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._fall_back(error)

    def run(
        self,
        stages: tuple[Stage, ...],
        until_s: float,
        clock: Clock,
        save: Callable[[str], None],
        save_every_s: float,
    ) -> None:
        """Train through `stages` until the clock shows `until_s`, saving at stage ends and every `save_every_s`."""
        start, saved, first = clock.elapsed_s(), clock.elapsed_s(), self.step
        total, stage_end = max(until_s - start, 1e-6), start
        for stage in stages:
            stage_end += stage.share * total
            tasks, weights = [t for t, _ in stage.tasks], [w for _, w in stage.tasks]
            recent: dict[Task, list[Tensor]] = {task: [] for task in tasks}
            stage_first, rate = self.step, 0.0
            while (
                clock.elapsed_s() < stage_end and self.step - stage_first < self.recipe.most_steps_per_stage
            ):
                task = self._dice.choices(tasks, weights)[0]
                rate = self.rate((clock.elapsed_s() - start) / total, self.step - first)
                recent[task].append(self.train_step(task, rate))
                if self.step % 10 == 0:
                    recent[task][
                        -1
                    ].item()  # keeps the host at most ten steps ahead of the device, so the clock is true
                if self.step % 100 == 0:
                    self._report(stage, recent, rate)
                if clock.elapsed_s() - saved > save_every_s:
                    save(stage.name)
                    saved = clock.elapsed_s()
            self._report(stage, recent, rate)
            save(stage.name)
            saved = clock.elapsed_s()

    def _report(self, stage: Stage, recent: dict[Task, list[Tensor]], rate: float) -> None:
        for task, losses in recent.items():
            if not losses:
                continue
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss} at step {self.step}; the last saved archive is still good"
                )
            self.log.add(
                "denoiser",
                stage=stage.name,
                size=task.size,
                stride=task.stride,
                step=self.step,
                loss=loss,
                lr=rate,
            )
