"""Images of an EDM network, one per seed, as a PNG folder or a zip with labels: the synthetic set S.

    torchrun --standalone --nproc_per_node=8 edm/sample.py --network_pkl edm-cifar10-32x32-cond-vp.pkl \\
        --outdir synthetic.zip --seeds 0-5999 --num_steps 18
    python edm/sample.py --network_pkl neon.safetensors --outdir images --seeds 0-63 --class 3

Image i of the set is determined by the i-th seed, whatever the batch size and the number of processes. A
conditional network draws a class per image, written to dataset.json. A killed run goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from edm.flags import EDMImageFlags
from edm.settings import AblationSettings, SamplerSettings
from neon.cli.command_line import finite, run_program
from neon.cli.flags import OptionalFileOrURL
from neon.cli.programs import SampleProgram
from neon.errors import RequestError

if TYPE_CHECKING:
    from neon.model import GenerativeModel
    from neon.runtime.distributed import Processes


@dataclass(frozen=True, kw_only=True)
class AblationFlags:
    """Sampler of EDM's ablations: any of these chooses it."""

    discretization: Annotated[Literal["vp", "ve", "iddpm", "edm"] | None, tyro.conf.arg(aliases=["--disc"])] = None
    """noise levels"""
    schedule: Literal["vp", "ve", "linear"] | None = None
    """noise level over time"""
    scaling: Literal["vp", "none"] | None = None
    """scaling of the state over time"""


@dataclass(frozen=True, kw_only=True)
class SampleEDM(AblationFlags, EDMImageFlags, SampleProgram):
    """Sample images of an EDM network into a PNG folder or a zip, with their labels.

    Example: python edm/sample.py --network_pkl base.pkl --outdir synthetic.zip --seeds 0-5999 --num_steps 18
    """

    refused: ClassVar[Mapping[str, str]] = {
        "subdirs": "all images lie in one folder, numbered in the order of seeds; leave it out"
    }

    seeds: str = "0-63"
    """one image per seed, such as 0-5999 or 1,2,5-10"""
    gnet: OptionalFileOrURL = None
    """published: as --self_trained, for any second network of the same data"""
    gnet_scale: float | None = None
    """as --sims, for --gnet"""

    def check(self) -> None:
        super().check()
        if (self.gnet is None) != (self.gnet_scale is None):
            raise RequestError("--gnet and --gnet_scale go together: the second network and its weight g")
        if self.gnet is not None and self.self_trained is not None:
            raise RequestError("--gnet and --self_trained: each is the second network; leave one of them out")
        if self.gnet_scale is not None:
            finite("--gnet_scale", [self.gnet_scale])

    def combined(self, path: Path, model: Any, group: "Processes") -> "GenerativeModel":
        if self.gnet is None or self.gnet_scale is None:
            return super().combined(path, model, group)
        from edm.model import EDM

        path, second = self.open(self.gnet, EDM, group)
        if (second.image_shape, second.num_classes) != (model.image_shape, model.num_classes):
            raise RequestError(
                f"--gnet: {path} makes {second.image_shape} images of {second.num_classes} classes, "
                f"{self.network_pkl} {model.image_shape} of {model.num_classes}; expected networks of the same data"
            )
        return model.combine(second.network, self.gnet_scale)

    def build_sampler(self) -> SamplerSettings:
        """That of EDM's ablations if one of their choices was made."""
        chosen = {name: getattr(self, name) for name in ("discretization", "schedule", "scaling")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return AblationSettings(**self.settings.given(), **chosen) if chosen else super().build_sampler()

    def facts(self, model: Any, group: "Processes") -> dict[str, Any]:
        from neon.runtime.download import shared_file
        from neon.runtime.files import hashes

        second = None if self.gnet is None else shared_file(self.gnet, group)
        return {
            **super().facts(model, group),
            "sampler": type(self.sampler()).__name__,
            "compile": self.compile,
            **group.on_main(lambda: hashes({"gnet": second})),
            "gnet_scale": self.gnet_scale,
        }


if __name__ == "__main__":
    sys.exit(run_program(SampleEDM))
