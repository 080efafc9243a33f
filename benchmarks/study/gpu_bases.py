"""Two larger bases on one GPU, in at most 4 minutes: is a converged sampler still improved where the network is larger?

    PYTHONPATH=benchmarks python -m study.gpu_bases --device cuda
    python benchmarks/run_study.py E          # scores them, and the demo's base with guidance

The demo's recipe at four times the channels, with and without augmentation. Training stops at the time that is allowed;
what was seen by then is in the file. Not run on a GPU so far; `--minutes 0.01 --device cpu` is a dry run.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from small_study import ROOT

from edm.model import EDM
from neon.demo.fashion import DEBIAN_FOLDER, load_fashion
from neon.demo.train import CONFIG, RECIPE
from neon.model import save_model
from neon.noise import ImageNoise, Purpose, image_seeds

CHANNELS = 128
OUT = ROOT / "runs" / "study" / "gpu"


def train(device: torch.device, augment: float, seconds: float, out: Path, data: Path) -> None:
    """Train from scratch for so many seconds; the averaged weights go to `out`."""
    torch.manual_seed(0)
    network = {**CONFIG["network"], "model_channels": CHANNELS, "augment_dim": 9 if augment else 0}  # type: ignore[dict-item]
    model = EDM({**CONFIG, "network": network}, augment=augment).to(device)
    images = load_fashion(data, "train")
    assert images.labels is not None
    recipe = replace(RECIPE, batch_size=512)
    optimizer = recipe.optimizer(model.network)
    average = [parameter.detach().clone() for parameter in model.network.parameters()]
    visits, seen, begun = recipe.visits(len(images), 0), 0, time.monotonic()
    while time.monotonic() - begun < seconds or not seen:
        places = [next(visits) for _ in range(recipe.batch_size)]
        noise = ImageNoise(image_seeds(Purpose.TRAINING, 0, recipe.batch_size, start=seen), device)
        loss = model.training_loss(
            model.encode(images.examples(places).to(device), noise), images.labels[places].to(device), noise
        ).mean()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(seen)
        optimizer.zero_grad()
        loss.backward()
        recipe.repair_gradients(model.network.parameters())
        optimizer.step()
        seen += recipe.batch_size
        recipe.update_average(average, list(model.network.parameters()), seen)
    for parameter, value in zip(model.network.parameters(), average, strict=True):
        parameter.data.copy_(value)
    save_model(out, model, metadata={"images_seen": str(seen)})
    print(f"{out}: {seen:,} images seen, loss {loss.item():.1f}")


def main(device: str = "cuda", minutes: float = 4.0, data: Path = DEBIAN_FOLDER, out: Path = OUT) -> None:
    """Train both.

    Args:
        device: Where.
        minutes: Allowed for both together.
        data: Folder with the four Fashion-MNIST files.
        out: Folder of the bases.
    """
    for augment in (0.0, 0.12):
        path = out / f"base-{CHANNELS}{'-augmented' if augment else ''}.safetensors"
        train(torch.device(device), augment, 30 * minutes, path, data)


if __name__ == "__main__":
    tyro.cli(main)
