"""Small untrained pipelines of diffusers' other families, built in code."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from conftest import tiny_vae, weighty
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPTS = ["a fox", "a hen", "a cat and a dog", "the sea"]


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=24)


def clip_config() -> CLIPTextConfig:
    n = len(clip_tokenizer())
    return CLIPTextConfig(
        vocab_size=n, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=8, bos_token_id=n - 2, eos_token_id=n - 1,
    )  # fmt: skip


def t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    words = ["<pad>", "</s>", "<unk>", *["a", "fox", "hen", "cat", "and", "dog", "the", "sea"]]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def sd15() -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        attention_head_dim=4, cross_attention_dim=8, norm_num_groups=4,
    )  # fmt: skip
    return StableDiffusionPipeline(
        tiny_vae(),
        CLIPTextModel(clip_config()),
        clip_tokenizer(),
        unet,
        DDIMScheduler(clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )


def pixart() -> PixArtAlphaPipeline:
    encoder, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        cross_attention_dim=32, caption_channels=16, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtAlphaPipeline(tokenizer, encoder, tiny_vae(), transformer, DPMSolverMultistepScheduler())


def sd3(**changes: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 4, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32,
            "pooled_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 8,
        } | changes
    )  # fmt: skip
    one, two = (CLIPTextModelWithProjection(clip_config()) for _ in range(2))
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        one,
        clip_tokenizer(),
        two,
        clip_tokenizer(),
        None,
        None,
    )


def sd35() -> StableDiffusion3Pipeline:
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def flux() -> FluxPipeline:
    encoder, tokenizer = t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,), latent_channels=1, norm_num_groups=4, sample_size=16, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return FluxPipeline(scheduler, vae, CLIPTextModel(clip_config()), clip_tokenizer(), encoder, tokenizer, transformer)


def ltx() -> LTXPipeline:
    """A pipeline without an adapter: video, with packed latents."""
    encoder, tokenizer = t5()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=16,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, tokenizer, transformer)


def ddpm() -> DDPMPipeline:
    """A pipeline without an adapter: pixels, no conditions, noise in every step."""
    unet = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler(clip_sample=False))


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd15": (sd15, {}),
    "pixart": (pixart, {"use_resolution_binning": False, "max_sequence_length": 8}),
    "sd3": (sd3, {"max_sequence_length": 4}),
    "sd35": (sd35, {"max_sequence_length": 4}),
    "flux": (flux, {"max_sequence_length": 4, "height": 8, "width": 8}),
}
"""Functions that build a pipeline, and further arguments of its call, by name."""


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of a family, and the arguments of its call."""
    build, call = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = build()
        weighty(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": PROMPTS, **call}
