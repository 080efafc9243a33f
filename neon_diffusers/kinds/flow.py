"""SD3Transformer2DModel over latents, a flow that is told prompts by two CLIP encoders and, if it is there, T5's."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neon_diffusers.encoders import CLIP_PROJECTED, T5
from neon_diffusers.kinds.latents import Latents
from neon_diffusers.kinds.text import Embedding, Text
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.schedulers import FLOW
from neon_diffusers.settings import FlowSettings

T5_LENGTH = 256
"""tokens that T5 tells of a prompt; rows of zeros stand for it where it is missing, as in diffusers"""
_T5 = "text_encoder_3"


class Flow(Text):
    """Prompts as the states before the last of both CLIP encoders side by side, then T5's, and pooled."""

    pipelines = ("StableDiffusion3Pipeline",)
    component = in_adapters = "transformer"
    lora_targets = (*Text.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    denoisers: ClassVar = {"SD3Transformer2DModel": "SD3Transformer2DModel"}
    frozen: ClassVar = {**Latents.frozen, "text_encoder": (CLIP_PROJECTED,), "text_encoder_2": (CLIP_PROJECTED,)}
    optional: ClassVar = {_T5: (T5,)}
    tokenizers: ClassVar = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", _T5: "tokenizer_3"}
    schedulers = (FLOW,)
    usual_size = 128

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self.width = self.denoiser.config.get("joint_attention_dim", 4096)
        self.default_settings = FlowSettings(shift=self.scheduler.config.get("shift", 1.0))

    def length(self, encoder: str) -> int | None:
        return T5_LENGTH if encoder == _T5 else None

    def embed(self, prompt: str) -> Embedding:
        said = [self.encoders[name](prompt, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        t5 = {"t5": self.encoders[_T5](prompt)[0]} if _T5 in self.encoders else {}
        states = torch.cat([one.hidden_states[-2] for one in said], dim=-1)
        return {"states": states, "pooled": torch.cat([one[0] for one in said], dim=-1), **t5}

    def predict_of(self, network: nn.Module, embedded: Embedding) -> Predict:
        states = self.joined(embedded)
        return lambda x, t: network(x, states, embedded["pooled"], t).sample

    def joined(self, embedded: Embedding) -> Tensor:
        """What the network attends to, [B, tokens of CLIP and of T5, C]."""
        clip, missing = embedded["states"], 0 if "t5" in embedded else T5_LENGTH
        clip = F.pad(clip, (0, self.width - clip.shape[-1], 0, missing))
        return clip if missing else torch.cat([clip, embedded["t5"]], dim=1)
