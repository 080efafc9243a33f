"""EDM's programs one after the other in one process group, for the tests that start it under torchrun."""

import os
import sys

import torch

from edm import calculate_fid, finetune, sample
from neon.command_line import run_program
from neon.distributed import processes

# Neither the images nor the blocks nor the micro-batches divide by 2 or 3.
COMMANDS = (
    (sample.Sample, sample.ALIASES, "--network_pkl base.pkl --outdir {out}/set --seeds 0-12 --batch 3 --num_steps 3"),
    (
        calculate_fid.CalculateFID,
        calculate_fid.ALIASES,
        "--network_pkl base.pkl --self_trained tuned.pkl --w 0.5 --ref real.npz --features features.safetensors "
        "--precision_recall real --seeds 0-19 --batch_size 3 --num_steps 3 --json {out}/scores.json "
        "--run_dir {out}/run",
    ),
    (
        finetune.Finetune,
        finetune.ALIASES,
        "--transfer base.pkl --data real --outdir {out}/training --augment 0 --dropout 0.1 --duration 0.000048 "
        "--batch 16 --batch_gpu 4 --tick 0.016 --snap 1 --lr_rampup 0.00003 --ema 0.0001",
    ),
)

if __name__ == "__main__":
    folder, out = sys.argv[1:]
    os.chdir(folder)
    torch.set_num_threads(1)
    with processes("cpu"):
        for program, aliases, flags in COMMANDS:
            code = run_program(program, aliases, [*flags.format(out=out).split(), "--device", "cpu"])
            if code:
                sys.exit(code)
