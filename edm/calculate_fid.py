"""FID, Inception Score, precision and recall of an EDM network, or of merges of two.

    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py --network_pkl checkpoints/Neon_EDM_FFHQ.pkl \\
        --ref https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz --seeds 0-49999 --num_steps 40
    python edm/calculate_fid.py --network_pkl base.pkl --self_trained snapshot.safetensors --w 0 0.5 1 --ref real.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from edm.published import warn_if_unusual
from edm.sampler import EDMSettings
from neon.command_line import run_program, seed_list, warn
from neon.distributed import processes
from neon.errors import RequestError
from neon.scoring import Sampling, ScoringFlags, load_base, score_network

ALIASES = {
    "--batch_size": "--max_batch_size",
    "--batch-size": "--max_batch_size",
    "--network": "--network_pkl",
    "--s_churn": "--S_churn",
    "--s_min": "--S_min",
    "--s_max": "--S_max",
    "--s_noise": "--S_noise",
}
DEFAULT_SEEDS = "0-9999"


@dataclass(frozen=True, kw_only=True)
class CalculateFID(ScoringFlags):
    """FID, Inception Score, precision and recall of an EDM network, or of merges of two.

    --batch_size is --max_batch_size; --s_churn, --s_min, --s_max and --s_noise are --S_churn and so on.
    """

    network_pkl: Annotated[str, tyro.conf.arg(metavar="FILE|URL")]
    """the network: a published .pkl, or safetensors written by neon"""
    seeds: str = DEFAULT_SEEDS
    """one image per seed, such as 0-49999 or 1,2,5-10; published FIDs are of 50,000"""
    max_batch_size: int = 64
    """images per forward pass of one process"""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """class of every image; by default drawn for each image from its own seed"""
    settings: Annotated[EDMSettings, tyro.conf.arg(name="")] = EDMSettings()  # noqa: RUF009 - frozen

    def __call__(self) -> None:
        seeds = seed_list(self.seeds)
        if self.max_batch_size < 1:
            raise RequestError(f"--max_batch_size {self.max_batch_size}: expected at least 1")
        if self.seeds == DEFAULT_SEEDS:
            warn("scoring the default of 10,000 images; published FIDs are of 50,000, and lower: add --seeds 0-49999")
            if self.self_trained is not None:
                warn("synthetic sets are usually drawn from these seeds: choose w on others, such as 50000-59999")
        with processes(self.device) as group:
            path, model = load_base(self.network_pkl, self, group)
            warn_if_unusual(model, self.settings)
            sampling = Sampling(
                seeds=seeds,
                seeds_text=self.seeds,
                settings=self.settings,
                label=self.class_,
                batch_size=self.max_batch_size,
            )
            score_network(path, model, sampling, self, group)


if __name__ == "__main__":
    sys.exit(run_program(CalculateFID, ALIASES))
