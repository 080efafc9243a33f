"""Images of an EDM network, one per seed, as a PNG folder or a zip with labels: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 edm/sample.py --network_pkl edm-cifar10-32x32-cond-vp.pkl \\
        --outdir synthetic.zip --seeds 0-5999 --num_steps 18
    python edm/sample.py --network_pkl neon.safetensors --outdir images --seeds 0-63 --class 3

Image i of the set is determined by the i-th seed, whatever the batch size and the number of processes. A
conditional network draws a class per image, written to dataset.json. A killed run goes on where it was.
"""

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from edm.ablation import AblationSettings
from edm.flags import ALIASES, ImageFlags
from edm.model import EDM
from edm.published import warn_if_unusual
from edm.sampler import EDMSettings, SamplerSettings
from neon import __version__
from neon.cli.command_line import run_program
from neon.errors import RequestError
from neon.model import GenerativeModel, load_model
from neon.runtime.distributed import Processes, processes
from neon.runtime.download import shared_file
from neon.runtime.files import sha256_file
from neon.sampling import check_enough, check_label, sample_set

ABLATION_ALIASES = {"--disc": "--discretization"}


@dataclass(frozen=True, kw_only=True)
class AblationFlags:
    """Sampler of EDM's ablations: any of these chooses it."""

    discretization: Literal["vp", "ve", "iddpm", "edm"] | None = None
    """noise levels"""
    schedule: Literal["vp", "ve", "linear"] | None = None
    """noise level over time"""
    scaling: Literal["vp", "none"] | None = None
    """scaling of the state over time"""


@dataclass(frozen=True, kw_only=True)
class Sample(ImageFlags, AblationFlags):
    """Sample images of an EDM network into a PNG folder or a zip, with their labels."""

    outdir: Path
    """folder of the images, or a name that ends in .zip"""
    seeds: str = "0-63"
    """one image per seed, such as 0-5999 or 1,2,5-10"""
    gnet: Annotated[str | None, tyro.conf.arg(metavar="FILE|URL")] = None
    """second network: sample from (1 + g) D - g D_gnet, in float32"""
    gnet_scale: float | None = None
    """g of the second network"""
    key: Annotated[str | None, tyro.conf.arg(metavar="KEY")] = None
    """nesting of the state dict in checkpoints, such as ema; chosen if not given"""
    compile: bool = False
    """compile the network: slow at first, then faster; other roundings"""
    fresh: bool = False
    """replace what the output holds"""
    device: Literal["cpu", "cuda"] | None = None
    """by default a GPU where there is one"""

    def __call__(self) -> None:
        seeds = self.checked_seeds()
        if (self.gnet is None) != (self.gnet_scale is None):
            raise RequestError("--gnet and --gnet_scale go together: the second network and its weight g")
        settings = self.sampler()
        with processes(self.device) as group:
            check_enough(len(seeds), group)
            path = shared_file(self.network_pkl, group)
            model = load_model(path, self.key, device=group.device)
            if self.compile:
                model.compile_parts()
            check_label(model, self.class_)
            identity = {
                "neon": __version__,
                "network_sha256": group.on_main(lambda: sha256_file(path)),
                "seeds": self.seeds,
                "class": self.class_,
                "batch_size": self.max_batch_size,
                "sampler": type(settings).__name__,
                "settings": asdict(settings),
                "compile": self.compile,
                "gnet": self.add_second_network(model, group),
                "gnet_scale": self.gnet_scale,
            }
            warn_if_unusual(model, settings)
            sample_set(
                model,
                seeds,
                settings,
                self.outdir,
                batch_size=self.max_batch_size,
                processes=group,
                identity=identity,
                label=self.class_,
                fresh=self.fresh,
            )
            if group.is_main:
                print(f"{self.outdir}: {len(seeds)} images")

    def sampler(self) -> SamplerSettings:
        """The settings, as those of EDM's ablations if one of their choices was made."""
        chosen = {name: getattr(self, name) for name in ("discretization", "schedule", "scaling")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if not chosen:
            return self.settings
        default = EDMSettings()
        common = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        for name in ("sigma_min", "sigma_max"):  # their defaults belong to the discretization
            if common[name] == getattr(default, name):
                del common[name]
        return AblationSettings(**common, **chosen)

    def add_second_network(self, model: GenerativeModel, group: Processes) -> str | None:
        """Give the model its second network, if one is asked for; the hash of its file."""
        if self.gnet is None or self.gnet_scale is None:
            return None
        path = shared_file(self.gnet, group)
        second = load_model(path, self.key, device=group.device)
        if not isinstance(model, EDM) or not isinstance(second, EDM):
            raise RequestError(f"--gnet: {self.network_pkl} and {path} must both be edm networks")
        if (second.image_shape, second.num_classes) != (model.image_shape, model.num_classes):
            raise RequestError(
                f"--gnet: {path} makes {second.image_shape} images of {second.num_classes} classes, "
                f"{self.network_pkl} {model.image_shape} of {model.num_classes}; expected networks of the same data"
            )
        model.second = (second.network, self.gnet_scale)
        return group.on_main(lambda: sha256_file(path))


if __name__ == "__main__":
    sys.exit(run_program(Sample, ALIASES | ABLATION_ALIASES))
