"""UNet2DModel over pixels, unconditional or with classes (`num_class_embeds`): DDPMPipeline and DDIMPipeline."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from neon.data.images import from_uint8
from neon.errors import RequestError
from neon.noise import Noise
from neon_diffusers.kinds.kind import Kind, height_and_width
from neon_diffusers.pipeline import Pipeline
from neon_diffusers.sampler import Predict
from neon_diffusers.settings import DiffusionSettings


class Pixels(Kind):
    """Of no guidance: such networks have no null class."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    component = "unet"
    denoisers: ClassVar = {"UNet2DModel": "UNet2DModel"}

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        config = self.denoiser.config
        channels, side = config.get("in_channels", 3), config.get("sample_size")
        height, width = height_and_width(side)
        if channels not in (1, 3) or not isinstance(height, int) or not isinstance(width, int):
            raise RequestError(
                f"{pipeline.source}: its unet takes {channels} channels of size {side}; expected pixels, 1 or 3 "
                "channels of a sample_size"
            )
        if (embedding := config.get("class_embed_type")) is not None:
            raise RequestError(
                f"{pipeline.source}: its unet has class_embed_type {embedding!r}; expected num_class_embeds, or no "
                "classes"
            )
        self.shape = self.image_shape = (channels, height, width)
        self.num_classes = config.get("num_class_embeds") or 0
        self.default_settings = DiffusionSettings(scheduler=self.scheduler.class_name)

    def predict(self, network: nn.Module, labels: Tensor | None, settings: Any) -> Predict:
        return _of(network, labels if self.num_classes else None)

    def predict_training(self, network: nn.Module, labels: Tensor | None, noise: Noise) -> Predict:
        return _of(network, labels if self.num_classes else None)

    def encode(self, images: Tensor) -> Tensor:
        """Pixels in [-1, 1]."""
        return from_uint8(images)

    def clean(self, examples: Tensor, noise: Noise) -> Tensor:
        return examples

    def decode(self, x: Tensor) -> Tensor:
        return x


def _of(network: Callable[..., Any], labels: Tensor | None) -> Predict:
    """What the network says, with `labels` on its device."""
    return lambda x, t: network(x, t, class_labels=None if labels is None else labels.to(x.device)).sample
