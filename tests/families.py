"""Small untrained pipelines of diffusers' other families, built in code."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from conftest import tiny_vae, weighty
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "fox", "hen", "cat", "and", "dog", "the", "sea"]
PROMPTS = ["a fox", "a hen", "a cat and a dog", "the sea"]


def clip_tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=24)


def clip_config(length: int = 24) -> CLIPTextConfig:
    n = len(clip_tokenizer())
    return CLIPTextConfig(
        vocab_size=n, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=8, bos_token_id=n - 2, eos_token_id=n - 1,
    )  # fmt: skip


def t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    words = ["<pad>", "</s>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    config = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
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
    """Video, with packed latents, and norms across heads."""
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


def latte() -> LattePipeline:
    """A pipeline without an adapter: video."""
    encoder, tokenizer = t5()
    transformer = LatteTransformer3DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, video_length=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )  # fmt: skip
    return LattePipeline(tokenizer, encoder, tiny_vae(), transformer, DDIMScheduler(clip_sample=False))


def sana() -> SanaPipeline:
    """Linear self-attention, and an FFN of convolutions."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    config = Gemma2Config(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokenizer, Gemma2Model(config), vae, transformer, scheduler)


def qwen_image() -> QwenImagePipeline:
    """Branches of guidance in calls of their own."""
    encoder, tokenizer = t5()
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
    )
    pipe = QwenImagePipeline(scheduler, vae, QwenText(encoder), tokenizer, transformer)
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


class QwenText(torch.nn.Module):
    """A text encoder with the interface of Qwen's."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        return self.encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)


def z_image() -> ZImagePipeline:
    """A denoiser that takes lists of latents and is told a rising time."""
    encoder, tokenizer = t5()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=4,
        n_kv_heads=4, cap_feat_dim=16, axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
    )  # fmt: skip
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, QwenText(encoder), tokenizer, transformer)


def wan(**changes: Any) -> WanPipeline:
    """Video; norms across heads, and branches of guidance in calls of their own."""
    encoder, tokenizer = t5()

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        )  # fmt: skip

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    second = {"transformer_2": transformer(), "boundary_ratio": 0.5} if changes.pop("two", False) else {}
    return WanPipeline(tokenizer, encoder, vae, scheduler, transformer(), **second)


def cogvideox() -> CogVideoXPipeline:
    """Video, with a noise schedule of its own."""
    encoder, tokenizer = t5()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=16,
        num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0)
    return CogVideoXPipeline(tokenizer, encoder, vae, transformer, scheduler)


def hunyuan_video() -> HunyuanVideoPipeline:
    """Video, with blocks whose heads and channels share a projection."""
    encoder, tokenizer = t5()
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    clip = CLIPTextModel(clip_config(77))
    return HunyuanVideoPipeline(QwenText(encoder), tokenizer, transformer, vae, scheduler, clip, clip_tokenizer())


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
    "sana": (
        sana,
        {
            "use_resolution_binning": False,
            "max_sequence_length": 8,
            "complex_human_instruction": None,
            "height": 32,
            "width": 32,
        },
    ),
    "qwen_image": (
        qwen_image,
        {"height": 32, "width": 32, "max_sequence_length": 8, "true_cfg_scale": 3.0, "negative_prompt": "the sea"},
    ),
    "z_image": (z_image, {"height": 16, "width": 16, "max_sequence_length": 8}),
    "ltx": (ltx, {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}),
    "wan": (wan, {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}),
    "cogvideox": (cogvideox, {"height": 16, "width": 16, "num_frames": 8, "max_sequence_length": 8}),
    "hunyuan_video": (
        hunyuan_video,
        {
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "max_sequence_length": 8,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
    ),
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
