"""FLUX: attention of double and single blocks, MLPs of double blocks and of single blocks, and the token
order.

The sequence is [text, image]. Image tokens are reordered on entry to the model together with their position
ids, from which the model computes its rotary tables, and put back on exit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from chipmunk_kernels.delta.attention import Ranges
from chipmunk_kernels.delta.engine import Engine
from chipmunk_kernels.delta.layer import AttentionLayer, MlpLayer
from chipmunk_kernels.delta.reorder import Reorder, block_order, raster_grid
from chipmunk_kernels.integrations.patches import Patches, autocasting, rotated, why_not_plain


class FluxDeltaAttnProcessor(FluxAttnProcessor):
    """The stock processor, with the delta where attention is computed."""

    def __init__(self, layer: AttentionLayer, adapter: FluxAdapter) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = adapter

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        reason = self._why_dense(attn, hidden_states, encoder_hidden_states, attention_mask)
        if reason is not None:
            self.layer.stays_dense(reason)
            inputs: Any = (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return super().__call__(attn, *inputs)
        q, k, v = _project(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            q, k = rotated(q, image_rotary_emb), rotated(k, image_rotary_emb)
        out = self.layer.attend(q, k, v, self.adapter.keep).flatten(2, 3)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, text:].contiguous()))
        return image, attn.to_add_out(out[:, :text].contiguous())

    @torch.compiler.disable
    def _why_dense(
        self, attn: Any, image: Tensor, text: Tensor | None, attention_mask: Tensor | None
    ) -> str | None:
        reason = self.layer.why_dense() or autocasting(image)
        if reason is not None:
            return reason
        if attention_mask is not None:
            return "attention mask"
        if self._parallel_config is not None:
            return "context parallel"
        rows = image.shape[1] + (0 if text is None else text.shape[1])
        extent = (image.shape[0], attn.heads, rows, rows, attn.head_dim)
        engine = self.layer.engine
        return engine.attention_reason(extent, image.dtype, image.device, self.adapter.keep)


def _project(attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, `(B, N, H, D)`; text comes before image."""
    if attn.fused_projections:
        parts = attn.to_qkv(image).chunk(3, dim=-1)
    else:
        parts = (attn.to_q(image), attn.to_k(image), attn.to_v(image))
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    q, k = attn.norm_q(q), attn.norm_k(k)
    if text is None or attn.added_kv_proj_dim is None:
        return q, k, v
    if attn.fused_projections:
        parts = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        parts = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    text_q, text_k, text_v = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
    return torch.cat((text_q, q), 1), torch.cat((text_k, k), 1), torch.cat((text_v, v), 1)


def sparse_feed_forward(module: Any, layer: MlpLayer) -> Callable[..., Tensor]:
    """A forward for `module` that runs the MLP delta where it can, and the module's own where not."""
    dense = module.forward

    @functools.wraps(dense)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = layer.why_dense() or _why_feed_forward_dense(module, layer, hidden_states)
        if reason is not None:
            layer.stays_dense(reason)
            return dense(hidden_states, *args, **kwargs)
        up, down = module.net[0].proj, module.net[2]
        return layer.run(hidden_states, up, down.weight, down.bias)

    return forward


@torch.compiler.disable
def _why_feed_forward_dense(module: Any, layer: MlpLayer, x: Tensor) -> str | None:
    net = module.net
    if len(net) != 3 or type(net[0]) is not GELU or net[0].approximate != "tanh":
        return "no linear, tanh GELU, linear"
    if module.training and net[1].p > 0:
        return "dropout is on"
    reason = autocasting(x) or why_not_plain(net[0].proj, x) or why_not_plain(net[2], x)
    if reason is not None:
        return reason
    batch, rows, width = x.shape
    return layer.engine.mlp_reason((batch, 1, rows, net[2].in_features, width), x.dtype, x.device)


def sparse_single_block(block: Any, layer: MlpLayer) -> Callable[..., Any]:
    """A forward for a single block, whose MLP shares its down-projection with the attention output.

    `proj_out` reads [attention, MLP]. Its MLP columns and its bias make the delta's cached output; the
    attention columns are one dense product that starts from that cache, so the sum costs no pass of its
    own.
    """
    dense = block.forward

    @functools.wraps(dense)
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        rows = text + hidden_states.shape[1]
        reason = layer.why_dense() or _why_single_block_dense(block, layer, hidden_states, rows)
        if reason is not None:
            layer.stays_dense(reason)
            return dense(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        residual = torch.cat((encoder_hidden_states, hidden_states), 1)
        normed, gate = block.norm(residual, emb=temb)
        attention = block.attn(
            hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        down, width = block.proj_out, attention.shape[-1]
        cached = layer.run(normed, block.proj_mlp, down.weight[:, width:], down.bias, share=True)
        projected = torch.addmm(cached.flatten(0, 1), attention.flatten(0, 1), down.weight[:, :width].t())
        out = residual + gate.unsqueeze(1) * projected.view_as(residual)
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        return out[:, :text], out[:, text:]

    return forward


@torch.compiler.disable
def _why_single_block_dense(block: Any, layer: MlpLayer, x: Tensor, rows: int) -> str | None:
    if type(block.act_mlp) is not nn.GELU or block.act_mlp.approximate != "tanh":
        return "no linear, tanh GELU, linear"
    reason = autocasting(x) or why_not_plain(block.proj_mlp, x) or why_not_plain(block.proj_out, x)
    if reason is not None:
        return reason
    batch, _, width = x.shape
    return layer.engine.mlp_reason((batch, 1, rows, block.proj_mlp.out_features, width), x.dtype, x.device)


class FluxAdapter:
    """Fits the engine into one `FluxTransformer2DModel`.

    Attributes:
        engine: the model's engine.
        keep: the always-kept columns of the forward in progress: the text, which comes first.
        unhooked: layers that already had a processor of their own, which stays.
    """

    def __init__(self, transformer: Any, engine: Engine, patches: Patches) -> None:
        self.engine = engine
        self.keep: Ranges = ()
        self._patches = patches
        self._reorder: Reorder | None = None
        self._orders: dict[Hashable, Reorder] = {}
        self.unhooked: list[str] = []
        double = [
            (f"transformer_blocks.{i}", block) for i, block in enumerate(transformer.transformer_blocks)
        ]
        single = [
            (f"single_transformer_blocks.{i}", block)
            for i, block in enumerate(transformer.single_transformer_blocks)
        ]
        for number, (name, block) in enumerate(double + single):
            self._attach_attention(f"{name}.attn", block.attn, number)
        for number, (name, block) in enumerate(double):
            self._attach_feed_forwards(name, block, number)
        for number, (name, block) in enumerate(single, start=len(double)):
            self._attach_single_mlp(name, block, number)

    def signature(self, inputs: dict[str, Any]) -> Hashable:
        """What stays the same within a generation."""
        image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        return image.shape, text.shape, image.dtype, image.device

    def enter(self, inputs: dict[str, Any], fresh: bool) -> dict[str, Any]:
        """The model's inputs, in block order; `inputs` itself stays as it is."""
        policy = self.engine.policy
        text = inputs["encoder_hidden_states"].shape[1]
        self.keep = ((0, text),) if text and policy.attention and policy.attention.keep_text else ()
        if fresh:
            self._reorder = self._find_reorder(inputs["img_ids"])
        if self._reorder is None:
            return inputs
        ids = inputs["img_ids"]
        ordered: dict[str, Any] = {
            "hidden_states": self._reorder.apply(inputs["hidden_states"]),
            "img_ids": self._reorder.apply(ids, dim=ids.dim() - 2),
        }
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if inputs.get(name) is not None:
                ordered[name] = [self._reorder.apply(sample) for sample in inputs[name]]
        return {**inputs, **ordered}

    def leave(self, output: Any) -> Any:
        """The model's output, back in raster order."""
        if self._reorder is None:
            return output
        if isinstance(output, tuple):
            return (self._reorder.undo(output[0]), *output[1:])
        return type(output)(sample=self._reorder.undo(output.sample))

    def _find_reorder(self, ids: Tensor) -> Reorder | None:
        patch = self.engine.policy.patch
        if not patch:
            return None
        grid = raster_grid(ids if ids.dim() == 2 else ids[0])
        if grid is None:
            self.engine.notes["the image ids are no single raster: tokens keep the model's order"] = None
            return None
        key = (grid, ids.device)
        if key not in self._orders:
            self._orders[key] = block_order(grid, patch, ids.device)
        return self._orders[key]

    def _attach_attention(self, name: str, attn: Any, number: int) -> None:
        if self.engine.policy.attention is None:
            return
        if type(attn.processor) is not FluxAttnProcessor:
            self.unhooked.append(f"{name}: attention processor {type(attn.processor).__name__}")
            return
        self._patches.processor(attn, FluxDeltaAttnProcessor(self.engine.attention(name, number), self))

    def _attach_feed_forwards(self, name: str, block: Any, number: int) -> None:
        if self.engine.policy.mlp is None:
            return
        parts = ("ff", "ff_context") if self.engine.policy.mlp.text_stream else ("ff",)
        for part in parts:
            module = getattr(block, part)
            if self._is_free(f"{name}.{part}", module):
                layer = self.engine.mlp(f"{name}.{part}", number)
                self._patches.forward(module, sparse_feed_forward(module, layer))

    def _attach_single_mlp(self, name: str, block: Any, number: int) -> None:
        if self.engine.policy.mlp is not None and self._is_free(name, block):
            layer = self.engine.mlp(f"{name}.proj_mlp", number)
            self._patches.forward(block, sparse_single_block(block, layer))

    def _is_free(self, name: str, module: nn.Module) -> bool:
        """Whether nobody wrapped the module's forward: another cache or offloading must stay outermost."""
        if "forward" not in module.__dict__:
            return True
        self.unhooked.append(f"{name}: forward already wrapped (a cache or offloading; enable it after us)")
        return False
