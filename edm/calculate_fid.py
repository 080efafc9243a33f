"""FID, Inception Score, precision and recall of an EDM network, or of merges of two.

    torchrun --standalone --nproc_per_node=8 edm/calculate_fid.py --network_pkl checkpoints/Neon_EDM_FFHQ.pkl \\
        --ref https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/ffhq-64x64.npz --seeds 0-49999 --num_steps 40
    python edm/calculate_fid.py --network_pkl base.pkl --self_trained snapshot.safetensors --w 0 0.5 1 --ref real.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from edm.flags import EDMImageFlags
from neon.cli.command_line import run_program
from neon.cli.programs import ScoreProgram
from neon.cli.refused import LOADING, SCORES, SELF_TRAINED
from neon.errors import warn

DEFAULT_SEEDS = "0-9999"


@dataclass(frozen=True, kw_only=True)
class ScoreEDM(EDMImageFlags, ScoreProgram):
    """FID, Inception Score, precision and recall of an EDM network, or of merges of two.

    Example: python edm/calculate_fid.py --network_pkl base.pkl --ref real.npz --seeds 0-49999 --num_steps 18
    """

    refused: ClassVar[Mapping[str, str]] = {
        **SCORES,
        "network_pkl_base": "name the base with --network_pkl",
        "network_pkl_aux_file": SELF_TRAINED,
        **dict.fromkeys(("network_pkl_aux_dir", "max_training_step"), "name one snapshot with --self_trained"),
        "differential_weights": "give the merge weights as --w 0.5 1 1.5",
        "seeds_test": "choose w in a run of its own: --seeds of other images than those that are reported",
        "real_data_dir": "name the real images with --precision_recall",
        **dict.fromkeys(("feat_batch_size", "feat_num_workers", "poll_timeout_sec"), LOADING),
        **dict.fromkeys(("cf_mode", "cf_model"), "name the feature network with --features"),
    }

    seeds: str = DEFAULT_SEEDS
    """one image per seed, such as 1,2,5-10; published: 0-49999"""

    def check(self) -> None:
        super().check()
        if self.seeds == DEFAULT_SEEDS:
            warn("scoring the default of 10,000 images; published FIDs are of 50,000, and lower: add --seeds 0-49999")
            if self.self_trained is not None:
                warn("synthetic sets are usually drawn from these seeds: choose w on others, such as 50000-59999")

    def seeds_text(self) -> str:
        return self.seeds


if __name__ == "__main__":
    sys.exit(run_program(ScoreEDM))
