"""The parts of the pipeline and their sizes: autoencoder, transformer, text encoders, tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suites.flux_shapes.scenes import Scenes, caption_words
from suites.flux_shapes.tokenizers import (
    CLIP_LENGTH,
    clip_ids,
    clip_tokenizer,
    t5_ids,
    t5_tokenizer,
    token_table,
)


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. Three autoencoder levels and 2×2 packing make one image token 8×8 pixels."""

    vae_channels: tuple[int, int, int] = (16, 32, 64)
    vae_groups: int = 8
    latent_channels: int = 4
    heads: int = 2
    double_blocks: int = 2
    single_blocks: int = 3
    t5_width: int = 128
    t5_layers: int = 2
    clip_width: int = 64
    clip_layers: int = 2


FULL = Sizes()
MINIATURE = Sizes((8, 8, 8), 4, 4, 1, 1, 1, 16, 1, 16, 1)
"""For tests: the same parts, small enough to train for a few steps on a CPU."""
TOKEN_PIXELS = 8
TEXT_LENGTH = 64
"""Padded T5 length that everything is trained at: `max_sequence_length` in the pipeline."""


def build_vae(sizes: Sizes) -> Any:
    """A fresh `AutoencoderKL` that maps a picture to `latent_channels` at a quarter of its side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        norm_num_groups=sizes.vae_groups,
        latent_channels=sizes.latent_channels,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=512,
        force_upcast=False,
    )


def build_transformer(sizes: Sizes) -> Any:
    """A fresh `FluxTransformer2DModel`; zero modulations and output make every block start as identity."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * sizes.latent_channels,
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=128,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.t5_width,
        pooled_projection_dim=sizes.clip_width,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    modulations = [block.norm.linear for block in model.single_transformer_blocks]
    modulations += [
        n.linear for block in model.transformer_blocks for n in (block.norm1, block.norm1_context)
    ]
    for layer in [*modulations, model.norm_out.linear, model.proj_out]:
        nn.init.zeros_(layer.weight)
    return model


def build_t5(sizes: Sizes, tokenizer: Any) -> Any:
    """A fresh T5 encoder over the caption words."""
    from transformers import T5Config, T5EncoderModel

    width = sizes.t5_width
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        num_heads=4,
        d_ff=2 * width,
        num_layers=sizes.t5_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # eager, like CLIP below: its trained position bias needs a gradient, which fused attention may not give
    return T5EncoderModel._from_config(config, attn_implementation="eager")


def build_clip(sizes: Sizes, tokenizer: Any) -> Any:
    """A fresh CLIP text encoder over the caption words."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.clip_width,
        intermediate_size=2 * sizes.clip_width,
        projection_dim=sizes.clip_width,
        num_hidden_layers=sizes.clip_layers,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel._from_config(config, attn_implementation="eager")


class Denoiser(nn.Module):
    """What the flow stage trains: the transformer and both text encoders."""

    def __init__(self, transformer: Any, t5: Any, clip: Any) -> None:
        super().__init__()
        self.transformer, self.t5, self.clip = transformer, t5, clip


class Captioner:
    """Turns scenes into the token ids that the pipeline's tokenizers give for their captions."""

    def __init__(self, clip: Any, t5: Any, device: torch.device | str) -> None:
        self.clip, self.t5 = clip, t5
        self._clip_table, self._t5_table = token_table(clip).to(device), token_table(t5).to(device)

    def __call__(self, scenes: Scenes, t5_length: int) -> tuple[Tensor, Tensor]:
        """CLIP ids `(B, 77)` and T5 ids `(B, t5_length)`."""
        words = caption_words(scenes)
        clip = clip_ids(words, self._clip_table, self.clip.bos_token_id, self.clip.eos_token_id)
        return clip, t5_ids(words, self._t5_table, self.t5.eos_token_id, self.t5.pad_token_id, t5_length)


@dataclass
class Parts:
    """All parts of one pipeline, on one device."""

    vae: Any
    denoiser: Denoiser
    clip_tokenizer: Any
    t5_tokenizer: Any

    def captioner(self, device: torch.device | str) -> Captioner:
        """Token ids for these tokenizers, made on `device`."""
        return Captioner(self.clip_tokenizer, self.t5_tokenizer, device)

    def pipeline(self, dtype: torch.dtype | None = None) -> Any:
        """The parts as a `FluxPipeline`; cast (in place) when a dtype is given."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
            ),
            vae=self.vae,
            text_encoder=self.denoiser.clip,
            tokenizer=self.clip_tokenizer,
            text_encoder_2=self.denoiser.t5,
            tokenizer_2=self.t5_tokenizer,
            transformer=self.denoiser.transformer,
        )
        return pipe.to(dtype=dtype) if dtype else pipe


def build(sizes: Sizes, device: torch.device | str, seed: int) -> Parts:
    """Fresh parts; the same seed gives the same weights on every machine (they are drawn on the CPU)."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    denoiser = Denoiser(build_transformer(sizes), build_t5(sizes, t5), build_clip(sizes, clip))
    return Parts(build_vae(sizes).to(device), denoiser.to(device), clip, t5)


def load(folder: Path, device: torch.device | str) -> Parts:
    """The parts of a saved pipeline folder in float32, ready to be trained further."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    denoiser = Denoiser(pipe.transformer, pipe.text_encoder_2, pipe.text_encoder)
    return Parts(pipe.vae.to(device), denoiser.to(device), pipe.tokenizer, pipe.tokenizer_2)
