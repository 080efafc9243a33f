"""A round of direct discriminative optimisation of an EDM (Zheng et al. 2025, arXiv 2503.01103), from its description.

    L = -E_real[log sigmoid(beta r)] - alpha E_own[log sigmoid(-beta r)],  r(x) = loss_base(x) - loss(x)

The network is trained to tell real images from those that the base draws, by how much better than the base it denoises
them. Network and base see the same noise; the loss is EDM's, summed over pixels. The published beta of 0.01 to 0.1 is
for images of 3,072 values; it is in proportion to one over their number.
"""

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from neon.data.images import ArrayDataset, ImageDataset, TrainingImages
from neon.model import GenerativeModel, save_model
from neon.noise import ImageNoise, Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.runtime.progress import Progress
from neon.sampling import write_samples
from study.families import Family
from study.plan import Contrasted, slug
from study.weights import SettingsOf, self_training_of


def contrasted(direction: Contrasted, family: Family, base: Path, folder: Path, settings_of: SettingsOf) -> Path:
    """The file of the trained weights; a killed training begins again."""
    own = folder / slug(direction)
    path = own / "weights.safetensors"
    if path.exists():
        return path
    drawing = self_training_of(direction, family, base)
    seeds = image_seeds(Purpose.SYNTHETIC, direction.seed, drawing.num_synthetic)
    frozen, model = family.load(base, False), family.load(base, True)
    write_samples(
        frozen,
        seeds,
        settings_of(direction.sampler),
        own / "synthetic",
        batch_size=family.batch_size,
        processes=Processes(),
        label=frozen.set_labels(len(seeds), direction.seed),
    )
    _train(direction, model, frozen, family.data().real(), ImageDataset(own / "synthetic"), drawing.recipe.batch_size)
    save_model(path, model)
    return path


def _train(
    direction: Contrasted,
    model: GenerativeModel,
    frozen: GenerativeModel,
    real: ArrayDataset,
    drawn: TrainingImages,
    batch: int,
) -> None:
    model.network.eval().requires_grad_(True)  # no dropout, or network and base would differ by it
    optimizer = torch.optim.Adam(model.network.parameters(), lr=direction.lr)
    visits = [_visits(dataset, direction, batch) for dataset in (real, drawn)]
    seeds = image_seeds(Purpose.TRAINING, direction.seed, 2 * batch * direction.steps)
    with Progress("real against own", direction.steps, "step", Processes()) as progress:
        for step, places in enumerate(islice(zip(*visits, strict=True), direction.steps)):
            loss = torch.zeros(())
            for number, (dataset, sign, weight) in enumerate(((real, 1, 1.0), (drawn, -1, direction.alpha))):
                first = (2 * step + number) * batch
                noise = ImageNoise(seeds[first : first + batch])
                better = _better(model, frozen, dataset, places[number], noise)
                loss = loss - weight * F.logsigmoid(sign * direction.beta * better).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.advance(1, loss=f"{loss.item():.3f}")


def _visits(dataset: TrainingImages, direction: Contrasted, batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(direction.seed)
    count = batch * direction.steps
    order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(-(-count // len(dataset)))])
    return [places.tolist() for places in order[:count].split(batch)]


def _better(
    model: GenerativeModel, frozen: GenerativeModel, dataset: TrainingImages, places: list[int], noise: ImageNoise
) -> torch.Tensor:
    """By how much less the loss of `model` is than that of `frozen`, per image: [B]."""
    assert dataset.labels is not None
    examples = model.encode(model.prepare(dataset.examples(places), noise), noise)
    labels = dataset.labels[torch.tensor(places)]
    with torch.no_grad():
        before = frozen.training_loss(examples, labels, noise.restarted())
    return before - model.training_loss(examples, labels, noise.restarted())
