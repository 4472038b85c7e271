"""HunyuanVideo: attention of double and single blocks, and the token order. The token refiner is left alone.

The sequence is [video, text], and the text is padded. diffusers hides the padding behind a bool mask even
when there is none, which makes dense attention 1.5× slower on an H200. Only how many text tokens are real
matters: one read per generation and guidance branch. The padding then takes no part at all, neither as keys
nor as queries, whose wishes would otherwise count in the column selection of the group they share with video
tokens. Their outputs are zeros, which nothing that is real ever looks at.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from chipmunk_kernels.delta.attention import Ranges
from chipmunk_kernels.delta.engine import Engine
from chipmunk_kernels.delta.layer import AttentionLayer
from chipmunk_kernels.delta.reorder import Reorder, block_order
from chipmunk_kernels.integrations.patches import Patches, autocasting, rotated

RAGGED = "prompts of different lengths in one batch"


class HunyuanDeltaAttnProcessor(HunyuanVideoAttnProcessor2_0):
    """The stock processor without the padding, and with the delta where attention is computed."""

    def __init__(self, layer: AttentionLayer, adapter: HunyuanAdapter) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    @torch.compiler.disable
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        length = self.adapter.text_length
        if length is None or encoder_hidden_states is None or self._parallel_config is not None:
            self.layer.stays_dense(
                "context parallel" if self._parallel_config else self.layer.why_dense() or RAGGED
            )
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        image, padding = hidden_states.shape[1], encoder_hidden_states.shape[1] - length
        keep = self.adapter.keep(image, length)
        reason = self._why_dense(attn, hidden_states, image + length, keep)
        q, k, v = _project(attn, hidden_states, encoder_hidden_states[:, :length], image_rotary_emb)
        if reason is None:
            out = self.layer.attend(q, k, v, keep)
        else:
            self.layer.stays_dense(reason)
            out = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        image_out, text_out = _project_out(attn, out.flatten(2, 3).to(q.dtype), image)
        return image_out, F.pad(text_out, (0, 0, 0, padding))

    def _why_dense(self, attn: Any, x: Tensor, rows: int, keep: Ranges) -> str | None:
        reason = self.layer.why_dense() or autocasting(x)
        if reason is not None:
            return reason
        extent = (x.shape[0], attn.heads, rows, rows, attn.inner_dim // attn.heads)
        return self.layer.engine.attention_reason(extent, x.dtype, x.device, keep)


def _project(attn: Any, image: Tensor, text: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, `(B, N, H, D)`: video, rotated, before text."""
    together = attn.add_q_proj is None
    x = torch.cat((image, text), 1) if together else image
    q, k, v = (linear(x).unflatten(2, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    q, k = _norm(attn.norm_q, q), _norm(attn.norm_k, k)
    if together:
        count = image.shape[1]
        tails = (q[:, count:], k[:, count:], None)
        q, k = q[:, :count], k[:, :count]
    else:
        linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (linear(text).unflatten(2, (attn.heads, -1)) for linear in linears)
        tails = (_norm(attn.norm_added_q, text_q), _norm(attn.norm_added_k, text_k), text_v)
    if rotary is not None:
        q, k = rotated(q, rotary), rotated(k, rotary)
    q, k = torch.cat((q, tails[0]), 1), torch.cat((k, tails[1]), 1)
    return q, k, v if tails[2] is None else torch.cat((v, tails[2]), 1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _project_out(attn: Any, out: Tensor, image: int) -> tuple[Tensor, Tensor]:
    image_out, text_out = out[:, :image], out[:, image:]
    if getattr(attn, "to_out", None) is not None:
        image_out = attn.to_out[1](attn.to_out[0](image_out))
    if getattr(attn, "to_add_out", None) is not None:
        text_out = attn.to_add_out(text_out)
    return image_out, text_out


class HunyuanAdapter:
    """Fits the engine into one `HunyuanVideoTransformer3DModel`.

    Attributes:
        engine: the model's engine.
        unhooked: layers that already had a processor of their own, which stays.
    """

    def __init__(self, transformer: Any, engine: Engine, patches: Patches) -> None:
        self.engine = engine
        self._patches = patches
        self._config = transformer.config
        self._lengths: dict[Hashable, int | None] = {}
        self._reorder: Reorder | None = None
        self._orders: dict[Hashable, Reorder] = {}
        self.unhooked: list[str] = []
        for number, (name, block) in enumerate(_blocks(transformer)):
            self._attach(f"{name}.attn", block.attn, number)
        if engine.policy.patch:
            self._attach_reorder(transformer)

    @property
    def text_length(self) -> int | None:
        """Real text tokens of the branch in hand; None if they differ within the batch."""
        return self._lengths.get(self.engine.branch)

    def keep(self, image: int, text: int) -> Ranges:
        """The always-kept columns where `image` video tokens come before `text` real text tokens."""
        policy = self.engine.policy.attention
        return ((image, image + text),) if policy is not None and policy.keep_text and text else ()

    def signature(self, inputs: dict[str, Any]) -> Hashable:
        """What stays the same within a generation."""
        video, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        return video.shape, text.shape, video.dtype, video.device

    def enter(self, inputs: dict[str, Any], fresh: bool) -> dict[str, Any]:
        """Read the text length of a new branch, and choose the token order of a new generation."""
        if fresh:
            self._lengths.clear()
            self._reorder = self._find_reorder(inputs["hidden_states"])
            if self.engine.policy.mlp is not None:
                self.engine.notes["HunyuanVideo's MLPs stay dense: their caches would not fit"] = None
        if self.engine.branch not in self._lengths:
            lengths = set(inputs["encoder_attention_mask"].sum(dim=1, dtype=torch.int).tolist())
            self._lengths[self.engine.branch] = lengths.pop() if len(lengths) == 1 else None
        return inputs

    def leave(self, output: Any) -> Any:
        """The output as it is: the last projection's hook has put the tokens back."""
        return output

    def _find_reorder(self, video: Tensor) -> Reorder | None:
        if not self.engine.policy.patch:
            return None
        if self._config.image_condition_type == "token_replace":
            self.engine.notes["first-frame tokens must come first: tokens keep the model's order"] = None
            return None
        sides = (self._config.patch_size_t, self._config.patch_size, self._config.patch_size)
        grid = tuple(extent // side for extent, side in zip(video.shape[2:], sides, strict=True))
        key = (grid, video.device)
        if key not in self._orders:
            self._orders[key] = block_order(grid, self.engine.policy.patch, video.device)
        return self._orders[key]

    def _attach(self, name: str, attn: Any, number: int) -> None:
        if self.engine.policy.attention is None:
            return
        if type(attn.processor) is not HunyuanVideoAttnProcessor2_0:
            self.unhooked.append(f"{name}: attention processor {type(attn.processor).__name__}")
            return
        layer = self.engine.attention(name, number)
        self._patches.processor(attn, HunyuanDeltaAttnProcessor(layer, self))

    def _attach_reorder(self, transformer: Any) -> None:
        """Reorder tokens as soon as they exist, and their rotary tables; put them back once projected."""

        def ordered(module: Any, args: Any, tokens: Tensor) -> Tensor:
            return tokens if self._idle() else self._order().apply(tokens)

        def ordered_tables(module: Any, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return tables if self._idle() else tuple(self._order().apply(table, dim=0) for table in tables)

        def raster(module: Any, args: Any, tokens: Tensor) -> Tensor:
            return tokens if self._idle() else self._order().undo(tokens)

        hooks = (
            (transformer.x_embedder, ordered),
            (transformer.rope, ordered_tables),
            (transformer.proj_out, raster),
        )
        for module, hook in hooks:
            self._patches.also(module.register_forward_hook(hook).remove)

    def _idle(self) -> bool:
        return self._reorder is None or self.engine.branch is None

    def _order(self) -> Reorder:
        assert self._reorder is not None
        return self._reorder


def _blocks(transformer: Any) -> list[tuple[str, Any]]:
    return [
        (f"{group}.{i}", block)
        for group in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(transformer, group))
    ]
