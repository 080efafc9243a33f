"""Tiny pipelines of random weights, written by diffusers' own classes; whoever calls these has diffusers."""

from pathlib import Path
from typing import Any

import torch

SIDE, LATENT, CLASSES = 8, 4, 3
"""of pixels and of latents; images of a pipeline over latents have twice the side"""
WIDTH, LENGTH = 8, 12
"""of what a text encoder says, and tokens of a prompt"""
CLIP_SIDE = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_TOKENS = ("<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS))


def pixels(folder: Path, scheduler: Any = None, classes: int | None = None, name: str = "DDIMPipeline") -> Path:
    """A UNet2DModel of 14k weights over 8 x 8 pixels, grey."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=classes,
    )  # fmt: skip
    pipe = getattr(diffusers, name)(unet, scheduler or diffusers.DDIMScheduler())
    pipe.save_pretrained(folder)
    return folder


def dit(folder: Path, scheduler: Any = None, *, learned: bool = True) -> Path:
    """A DiTTransformer2DModel over the latents of an AutoencoderKL, of 3 classes."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=LATENT, out_channels=2 * LATENT if learned else None,
        num_layers=1, sample_size=4, num_embeds_ada_norm=CLASSES, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, autoencoder(), scheduler or diffusers.DDIMScheduler())
    pipe.save_pretrained(folder)
    return folder


def stable(folder: Path, scheduler: Any = None) -> Path:
    """A UNet2DConditionModel over such latents, told prompts by a CLIP text encoder, as of Stable Diffusion."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=LATENT, in_channels=LATENT, out_channels=LATENT, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        autoencoder(), transformers.CLIPTextModel(_clip()), tokenizer(), unet,
        scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def stable3(folder: Path, *, t5: bool = False) -> Path:
    """An SD3Transformer2DModel over such latents, told prompts by two CLIP encoders and perhaps T5's."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENT, patch_size=1, in_channels=LATENT, out_channels=LATENT, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=4 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    config = transformers.T5Config(
        vocab_size=110, d_model=4 * WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(shift_factor=0.1),
        transformers.CLIPTextModelWithProjection(_clip()), tokenizer(),
        transformers.CLIPTextModelWithProjection(_clip()), tokenizer(),
        transformers.T5EncoderModel(config) if t5 else None, transformers.T5TokenizerFast() if t5 else None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """A CLIP tokenizer of letters and digits, for prompts of up to 10 of them."""
    import transformers

    vocabulary = {token: number for number, token in enumerate(_TOKENS)}
    return transformers.CLIPTokenizer(vocabulary, [], model_max_length=LENGTH)


def clip(folder: Path) -> Path:
    """A CLIPModel, both towers, of images of 16 x 16 pixels, with its tokenizer and its processor of images."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(1)  # with which images are on the side of prompts, on average
    seen = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        image_size=CLIP_SIDE, patch_size=4,
    )  # fmt: skip
    config = transformers.CLIPConfig(text_config=_clip().to_dict(), vision_config=seen.to_dict(), projection_dim=WIDTH)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIDE}, crop_size=CLIP_SIDE).save_pretrained(folder)
    return folder


def _clip() -> Any:
    import transformers

    return transformers.CLIPTextConfig(
        vocab_size=len(_TOKENS), hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def autoencoder(**more: Any) -> Any:
    """Images of twice the side of their latents, 3 channels to 4."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=LATENT, norm_num_groups=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **more,
    )  # fmt: skip
