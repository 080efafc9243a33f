"""A fifth architecture in one file: a rectified flow over pixels. `docs/own_model.md` takes it through Neon.

python docs/examples/flow.py --data images.zip --output runs/own/base.safetensors    # a minute on one core
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from neon.cli.command_line import exit_code
from neon.data.images import ArrayDataset, ImageDataset, from_uint8, to_uint8
from neon.demo.assets import REAL_IMAGES, real_images
from neon.model import GenerativeModel, save_model
from neon.noise import Noise
from neon.recipe import Recipe


class Velocity(nn.Module):
    """The direction from noise to images at time t, for images of `pixels` values: residual layers of `width`."""

    def __init__(self, pixels: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter = nn.Linear(pixels, width)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, pixels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, pixels], [B, 1] -> [B, pixels]"""
        angles = t * torch.linspace(0, 5, 16, device=x.device).exp()
        h, time = self.enter(x), self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h + time)
        return self.leave(h)


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """How to sample."""

    num_steps: int = 5
    """Euler steps, from noise (t = 0) to an image (t = 1)"""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; expected at least 1")


class Flow(GenerativeModel):
    """Unconditional rectified flow; config: {"image_shape": [C, H, W], "width": N, "depth": N}."""

    architecture = "flow"

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        channels, height, width = config["image_shape"]
        self.image_shape = (channels, height, width)
        self.num_classes = 0
        self.network = Velocity(channels * height * width, config["width"], config["depth"])
        self.default_settings = FlowSettings()
        self.recipe = Recipe(batch_size=128, lr=1e-4)

    @torch.no_grad()
    def sample(self, noise: Noise, labels: Tensor | None, settings: FlowSettings) -> Tensor:
        """Draws per image: the noise it starts from."""
        x = noise.normal(*self.image_shape).flatten(1)
        for step in range(settings.num_steps):
            t = torch.full((len(x), 1), step / settings.num_steps, device=x.device)
            x = x + self.network(x, t) / settings.num_steps
        return to_uint8(x.unflatten(1, self.image_shape))

    def encode(self, images: Tensor, noise: Noise) -> Tensor:
        """uint8 -> float32 in [-1, 1]; draws nothing."""
        return from_uint8(images)

    def training_loss(self, examples: Tensor, labels: Tensor | None, noise: Noise) -> Tensor:
        """Per image, the squared error of the velocity: [B]. Draws per image: a time, then the noise."""
        x, t = examples.flatten(1), noise.uniform(1)
        start = noise.normal(x.shape[1])
        return (self.network(start + t * (x - start), t) - (x - start)).square().mean(dim=1)


def train(output: Path, data: Path | None = None, steps: int = 2500, seed: int = 0) -> None:
    """Train a base, by any loop you like, on a folder or zip of images; by default 2,000 that come with neon."""
    torch.manual_seed(seed)
    dataset = ImageDataset(data) if data else ArrayDataset(real_images(), None, REAL_IMAGES)
    model = Flow({"image_shape": list(dataset.image_shape), "width": 256, "depth": 4})
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = from_uint8(dataset.examples(torch.randint(len(dataset), (128,)).tolist())).flatten(1)
        t, start = torch.rand(len(x), 1), torch.randn_like(x)
        loss = (model.network(start + t * (x - start), t) - (x - start)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_model(output, model)


if __name__ == "__main__":
    sys.exit(exit_code("flow.py", lambda: tyro.cli(train)))
