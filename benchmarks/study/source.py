"""Synthetic sets that another architecture has drawn, for the training of this one."""

from dataclasses import replace
from pathlib import Path

from neon.noise import Purpose, image_seeds
from neon.runtime.distributed import Processes
from neon.sampling import write_samples
from study.families import FAMILIES, Family
from study.plan import SelfTrained, at

GIVEN = {
    "imm": at(num_steps=2, guidance=1.5),
    "xAR": at(num_steps=8, guidance=1.0),
}
"""the sampler that each family draws with"""


def write_foreign_set(direction: SelfTrained, family: Family, folder: Path) -> None:
    """The set S of another family's first base, where `SelfTraining` looks for its own."""
    source = FAMILIES[direction.source]()
    model = source.load(source.bases[0], False)
    settings = replace(model.default_settings, **dict(GIVEN[direction.source].changes))
    seeds = image_seeds(Purpose.SYNTHETIC, direction.seed, direction.num or family.num_synthetic)
    label = model.set_labels(len(seeds), direction.seed)
    write_samples(
        model, seeds, settings, folder, batch_size=source.batch_size, processes=Processes(), label=label
    )  # fmt: skip
