"""UNet2DConditionModel over latents, told prompts by a CLIP text encoder: StableDiffusionPipeline, versions 1 and 2."""

from typing import ClassVar

from torch import nn

from neon.errors import RequestError
from neon_diffusers.encoders import CLIP
from neon_diffusers.kinds.latents import Latents
from neon_diffusers.kinds.text import Embedding, Text
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.settings import GuidedSettings

_MORE = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")
"""settings of a denoiser that is told more than a prompt: sizes, depths, images, the guidance"""


class StableDiffusion(Text):
    """Prompts as the last states of the encoder."""

    pipelines = ("StableDiffusionPipeline",)
    component = in_adapters = "unet"
    denoisers: ClassVar = {"UNet2DConditionModel": "UNet2DConditionModel"}
    frozen: ClassVar = {**Latents.frozen, "text_encoder": (CLIP,)}
    tokenizers: ClassVar = {"text_encoder": "tokenizer"}
    usual_size = 64

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        config = self.denoiser.config
        more = [name for name in _MORE if config.get(name) is not None]
        if config.get("in_channels", 4) != config.get("out_channels", 4):
            more.append("in_channels other than out_channels")
        if more:
            raise RequestError(
                f"{pipeline.source}: its unet has {', '.join(more)}, so it is told more than a prompt; expected one of "
                "Stable Diffusion 1 or 2"
            )
        self.default_settings = GuidedSettings(scheduler=self.scheduler.class_name, guidance=7.5)

    def embed(self, prompt: str) -> Embedding:
        return {"states": self.encoders["text_encoder"](prompt)[0]}

    def predict_of(self, network: nn.Module, embedded: Embedding) -> Predict:
        return lambda x, t: network(x, t, encoder_hidden_states=embedded["states"]).sample
