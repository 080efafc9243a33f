"""FID, Inception Score, precision and recall of an EDM network, or of merges of two.

    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py --network_pkl checkpoints/Neon_EDM_FFHQ.pkl \\
        --ref https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz --seeds 0-49999 --num_steps 40
    python edm/calculate_fid.py --network_pkl base.pkl --self_trained snapshot.safetensors --w 0 0.5 1 --ref real.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass

from edm.flags import ALIASES, ImageFlags
from edm.published import warn_if_unusual
from neon.cli.command_line import run_program
from neon.cli.score import Sampling, ScoringFlags, score_network
from neon.errors import warn
from neon.model import load_model
from neon.runtime.distributed import processes
from neon.runtime.download import shared_file

DEFAULT_SEEDS = "0-9999"


@dataclass(frozen=True, kw_only=True)
class CalculateFID(ImageFlags, ScoringFlags):
    """FID, Inception Score, precision and recall of an EDM network, or of merges of two."""

    seeds: str = DEFAULT_SEEDS
    """one image per seed, such as 1,2,5-10; published: 0-49999"""

    def __call__(self) -> None:
        seeds = self.checked_seeds()
        if self.seeds == DEFAULT_SEEDS:
            warn("scoring the default of 10,000 images; published FIDs are of 50,000, and lower: add --seeds 0-49999")
            if self.self_trained is not None:
                warn("synthetic sets are usually drawn from these seeds: choose w on others, such as 50000-59999")
        with processes(self.device) as group:
            path = shared_file(self.network_pkl, group)
            model = load_model(path, self.key, device=group.device)
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
