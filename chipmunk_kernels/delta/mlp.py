"""The MLP delta of one layer and one guidance branch. Source: arXiv 2506.03275, section 4.

    full step     mid = X W₁ᵀ + b₁;  A = gelu_tanh(mid);  O = A W₂ᵀ + b₂
                  cache A (neuron-major), O, and P = fc1(group means of X)
    sparse step   change = |fc1(group means of X) − P|, a GEMM 1/group_size the size
                  for its largest columns: O += (new − old activations) W₂, A := new ones, P := new means

fc1 is affine, so the mean of its outputs, mid's, is its output at the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chipmunk_kernels.columns import ColumnSet
from chipmunk_kernels.delta.attention import mix_seed
from chipmunk_kernels.delta.launch import Launch
from chipmunk_kernels.delta.policy import MlpPolicy
from chipmunk_kernels.delta.report import Selection, Usage
from chipmunk_kernels.ops.mlp import bias_gelu, group_mean, sparse_mlp
from chipmunk_kernels.ops.select import topk_columns

LINE = 64
"""Elements that rows of neuron-major activations are a multiple of apart, 128 bytes or more.

Rows that do not start at a multiple of 16 bytes leave library products, and our kernels, narrow loads only.
"""


@dataclass
class MlpWeights:
    """An MLP `gelu_tanh(x w1ᵀ + b1) w2ᵀ + b2`, as `nn.Linear` stores its weights.

    Attributes:
        up: `(F, K)`, up_bias `(F,)` or None.
        down: `(Kout, F)`, a view of a wider matrix where the layer shares it; down_bias `(Kout,)` or None.
        by_neuron: gives `(F, Kout)`, `down` transposed with rows contiguous, for the gather of kept
            neurons. Asked for on sparse steps only.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    by_neuron: Callable[[], Tensor]


@dataclass
class MlpDelta:
    """State of one layer and one guidance branch; call it once per step.

    A sparse step whose caches are older than the schedule's last full step runs full.

    Attributes:
        policy: what to keep and when.
        seed: seeds the random extras, together with the step.
        launch: an explicit profile's choice of kernels.
        usage: where calls and selections are counted.
    """

    policy: MlpPolicy
    seed: int = 0
    launch: Launch = field(default_factory=Launch)
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop every cache."""
        self.columns: ColumnSet | None = None
        self._activations: Tensor | None = None
        self._out: Tensor | None = None
        self._means: Tensor | None = None
        self._refreshed: int | None = None
        self._since = 0
        self._selection: Selection | None = None
        self._extent: tuple[object, ...] = ()

    @property
    def cache_bytes(self) -> int:
        held = (self._activations, self._out, self._means, self.columns)
        return sum(part.nbytes for part in held if part is not None)

    def __call__(self, x: Tensor, weights: MlpWeights, step: int, *, share: bool = False) -> Tensor:
        """MLP output `(B, M, Kout)`, output bias included.

        Args:
            x: `(B, M, K)`.
            weights: the same layer's on every call.
            step: number of the denoising step, from the step clock.
            share: the caller only reads the result, before the next call: it may be the cache itself.
                Otherwise it is a copy.
        """
        extent = (x.shape, x.dtype, x.device)
        if extent != self._extent:
            self.reset()
            self._extent = extent
        fresh = self._refreshed is not None and self._refreshed >= self.policy.schedule.last_full(step)
        if fresh and not self.policy.schedule.is_full(step):
            self.usage.sparse += 1
            out = self._sparse(x, weights, step)
        else:
            self.usage.full += 1
            out = self._full(x, weights, step)
        return out if share or out is not self._out else out.clone()

    def _full(self, x: Tensor, weights: MlpWeights, step: int) -> Tensor:
        # Freed before their successors are made, so that the peak holds one set of caches.
        self.columns = self._activations = self._out = self._means = None
        self._refreshed = None
        if self.policy.schedule.is_full(step + 1):
            return by_token(x, weights)[1]
        self._means = self._fc1_of_means(x, weights)
        if neuron_major(x.device):
            self._activations, self._out = by_neuron(x, weights)
        else:
            activations, self._out = by_token(x, weights)
            self._activations = activations.transpose(1, 2).contiguous()
        self._refreshed, self._since = step, 0
        return self._out

    def _sparse(self, x: Tensor, weights: MlpWeights, step: int) -> Tensor:
        assert self._activations is not None and self._out is not None and self._means is not None
        means = self._fc1_of_means(x, weights)
        if self._since % self.policy.reselect_every == 0:
            self._choose(means, step)
        assert self.columns is not None and self._selection is not None
        self._since += 1
        self._selection.uses += 1
        self._update_means(means)
        return sparse_mlp(
            x,
            weights.up,
            weights.up_bias,
            weights.by_neuron(),
            self.columns,
            self._activations,
            self._out,
            activation="gelu_tanh",
            **self._launch("sparse_mlp", x, weights),
        )

    def _choose(self, means: Tensor, step: int) -> None:
        assert self._means is not None
        neurons = means.shape[-1]
        change = (means.float() - self._means.float()).abs_().unsqueeze(1)
        self.columns = topk_columns(
            change,
            round(self.policy.keep * neurons),
            group_size=self.policy.group_size,
            random=round(self.policy.random * neurons),
            seed=mix_seed(self.seed, step),
            **self._launch_topk(change),
        )
        self._selection = self.usage.select(self.columns, neurons)

    def _update_means(self, means: Tensor) -> None:
        """P[cols] := the means that the kept activations are now computed from."""
        assert self._means is not None and self.columns is not None
        wanted = round(self.policy.keep * means.shape[-1]) + round(self.policy.random * means.shape[-1])
        if self.columns.capacity <= wanted:  # every slot is kept, so padding cannot hit a column that is not
            chosen = self.columns.indices[:, 0].long()
            self._means.scatter_(-1, chosen, means.gather(-1, chosen))
        else:
            kept = self.columns.to_mask(means.shape[-1])[:, 0]
            self._means = torch.where(kept, means, self._means)

    def _launch_topk(self, change: Tensor) -> dict[str, Any]:
        batch, _, groups, neurons = change.shape
        size, density = self.policy.group_size, expected_density(self.policy, neurons)
        extent = (batch, 1, groups * size, neurons, 1)
        return self.launch("topk_columns", change.device, change.dtype, extent, size, density)

    def _fc1_of_means(self, x: Tensor, weights: MlpWeights) -> Tensor:
        """fc1 at the group means of x, `(B, G, F)`."""
        batch, rows, width = x.shape
        extent = (batch, 1, rows, width, width)
        launch = self.launch("group_mean", x.device, x.dtype, extent, self.policy.group_size)
        return F.linear(group_mean(x, self.policy.group_size, **launch), weights.up, weights.up_bias)

    def _launch(self, operation: str, x: Tensor, weights: MlpWeights) -> dict[str, Any]:
        if self.launch.profile is None:
            return {}
        assert self.columns is not None
        batch, rows, width = x.shape
        neurons = weights.up.shape[0]
        density = self.columns.capacity / neurons
        extent = (batch, 1, rows, neurons, width)
        return self.launch(operation, x.device, x.dtype, extent, self.policy.group_size, density)


def neuron_major(device: torch.device) -> bool:
    """Whether a full step computes the activations as they are cached.

    On a GPU: made by token, they took an H200 a strided copy of 0.33 ms at FLUX's size, which did not hide
    beside the product. On a CPU PyTorch's bfloat16 products may take several times as long that way round
    (two AVX2 cores, 4096 tokens, 256 → 1024 → 256: 6.8 s a step against 0.9; float32: no difference).
    """
    return device.type == "cuda"


def by_token(x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
    """The dense MLP: activations `(B, M, F)` and output `(B, M, Kout)` of x `(B, M, K)`."""
    activations = F.gelu(F.linear(x, weights.up, weights.up_bias), approximate="tanh")
    return activations, F.linear(activations, weights.down, weights.down_bias)


def by_neuron(x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
    """The same, its activations `(B, F, M)`: rows contiguous, a multiple of `LINE` apart.

    No more memory than both: the first product becomes the activations in place. One batch entry at a time,
    since only products of two matrices add a bias themselves.
    """
    batch, tokens, _ = x.shape
    pitch = -(-tokens // LINE) * LINE
    padded = x.new_empty(batch, weights.up.shape[0], pitch)
    activations = padded[..., :tokens]
    out = x.new_empty(batch, tokens, weights.down.shape[0])
    for entry, mid in zip(x, activations, strict=True):
        torch.mm(weights.up, entry.t(), out=mid)
    bias_gelu(padded, weights.up_bias)  # whole rows load wide; what lies past the tokens is never read
    for columns, rows in zip(activations, out, strict=True):
        if weights.down_bias is None:
            torch.mm(columns.t(), weights.down.t(), out=rows)
        else:
            torch.addmm(weights.down_bias, columns.t(), weights.down.t(), out=rows)
    return activations, out


def expected_density(policy: MlpPolicy, neurons: int) -> float:
    """Density that the policy asks for, at most 1."""
    return min(1.0, (round(policy.keep * neurons) + round(policy.random * neurons)) / neurons)
