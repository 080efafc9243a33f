"""EDM's programs one after the other in one process group, for the tests that start it in several processes."""

import sys
from pathlib import Path

import torch

from edm import calculate_fid, finetune, sample
from neon.cli.command_line import run_program
from neon.data.images import ImageDataset
from neon.model import load_model
from neon.recipe import Recipe
from neon.runtime.distributed import Processes, processes
from neon.selftrain import train

# Neither the images nor the blocks nor the micro-batches divide by 2 or 3.
COMMANDS = (
    (sample.SampleEDM, "--network_pkl base.pkl --outdir set --seeds 0-12 --batch 3 --num_steps 3"),
    (
        calculate_fid.ScoreEDM,
        "--network_pkl base.pkl --self_trained tuned.pkl --w 0.5 --ref real.npz --features features.safetensors "
        "--precision_recall real --seeds 0-19 --batch_size 3 --num_steps 3 --json scores.json --run_dir run",
    ),
    (
        finetune.TrainEDM,
        "--transfer base.pkl --data real --outdir training --augment 0 --dropout 0.1 --duration 0.000048 "
        "--batch 16 --batch_gpu 4 --tick 0.016 --snap 1 --lr_rampup 0.00003 --ema 0.0001",
    ),
)

# A request that turns out wrong in one process only: the image that cannot be read is in the second block.
WRONG = (
    COMMANDS[1][1]
    .replace("--precision_recall real", "--precision_recall corrupt")
    .replace("--json scores.json --run_dir run", "--json wrong/scores.json --run_dir wrong/run")
)


def train_summed(folder: Path, group: Processes) -> None:
    """Train as on GPUs, where gradients are summed in any order."""
    train(
        load_model("base.pkl"),
        ImageDataset("real"),
        folder,
        num_steps=2,
        snapshot_steps=[],
        recipe=Recipe(batch_size=16, lr=1e-4),
        seed=0,
        processes=group,
        micro_batch=4,
        parallel="ddp",
    )


def main() -> None:
    torch.set_num_threads(1)
    with processes("cpu") as group:
        for program, flags in COMMANDS:
            code = run_program(program, [*flags.split(), "--device", "cpu"])
            if code:
                sys.exit(code)
        train_summed(Path("summed"), group)
        if run_program(calculate_fid.ScoreEDM, [*WRONG.split(), "--device", "cpu"]) != 2:
            sys.exit("the corrupt image was not refused in every process")


if __name__ == "__main__":
    main()
