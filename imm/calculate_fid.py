"""FID, Inception Score, precision and recall of an IMM network, or of merges of two.

    PYTHONPATH=imm torchrun --standalone --nproc_per_node=8 imm/calculate_fid.py \\
        --network_pkl checkpoints/Neon_imm_imagenet256.pkl --fid_stats fid_stats/adm_in256_stats.npz \\
        --num_steps 8 --cfg_scale 1.8
    python imm/calculate_fid.py --network_pkl base.pkl --self_trained snapshot.safetensors --w 0 1.2 1.8 \\
        --per_class_count 10 --images_for selection --fid_stats fid_stats/adm_in256_stats.npz

The last line of the output begins with `FID=`. The score depends neither on the number of processes nor
on restarts: a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass

from imm.flags import ALIASES, ImageFlags, use_tensor_cores
from neon.cli.command_line import run_program
from neon.cli.flags import ScoredImages
from neon.cli.score import score_network
from neon.runtime.distributed import processes


@dataclass(frozen=True, kw_only=True)
class CalculateFID(ImageFlags, ScoredImages):
    """FID, Inception Score, precision and recall of an IMM network, or of merges of two."""

    def __call__(self) -> None:
        self.check()
        with processes(self.device) as group:
            use_tensor_cores()
            path, model = self.load(group)
            images = self.counted(model)
            sampling = images.sampling(model, self.settings(model), self.facts(group, model))
            score_network(path, model, sampling, self, group)


if __name__ == "__main__":
    sys.exit(run_program(CalculateFID, ALIASES))
