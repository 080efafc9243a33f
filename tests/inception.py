"""Random weights for the Inception network, and images that they tell apart."""

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Untrained(FeatureExtractorInceptionV3):
    """The network with torch's own initial weights: its constructor insists on loading some."""

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("untrained", ["2048"], feature_extractor_weights_path=nothing)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


def varied_images(count: int, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 [count, channels, size, size]: coarse patterns of unequal contrast under unequal noise."""
    draw = torch.Generator().manual_seed(seed)
    contrast, noise = 0.5 + 0.5 * torch.rand(2, count, 1, 1, 1, generator=draw)
    coarse = torch.rand(count, channels, 4, 4, generator=draw)
    pattern = nn.functional.interpolate(coarse, size, mode="bilinear")
    speckle = torch.rand(count, channels, size, size, generator=draw)
    return (200 * contrast * pattern + 55 * noise * speckle).to(torch.uint8)


@torch.no_grad()
def random_inception(seed: int = 0) -> dict[str, Tensor]:
    """A state dict for the network: He's weights, batch statistics of a few images, logits of spread 2.

    Without the statistics, features of different images would hardly differ; without the last step every image would
    be of the same class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            network = _Untrained()
        network = network.to_empty(device="cpu")
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                nn.init.constant_(module.bias, 0.5)  # with 0, the layers magnify rounding four times as much
                module.momentum = None  # the running statistics become those of the one batch
        (features,) = network.to(memory_format=torch.channels_last).train()(varied_images(6))
        head = nn.init.normal_(network.fc.weight)
        nn.init.normal_(network.fc.bias)
    common = features.mean(0)
    head -= torch.outer(head @ common, common / (common @ common))
    head *= 2 / (features @ head.T).std()
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
