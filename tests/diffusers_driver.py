"""The commands of any model on a pipeline of diffusers, for the tests that start them in several processes."""

from neon.cli.programs import Sample, Selftrain
from tests.programs import drive

# Neither the images nor the blocks nor the micro-batches divide by 2 or 3.
COMMANDS = (
    (Sample, "--network dit --outdir set --num_images 13 --batch_size 3 --set scheduler=DDPMScheduler num_steps=3"),
    (
        Selftrain,
        "--network dit --data real --outdir training --batch 24 --batch_gpu 4 --total_images 72 --save_interval 24 "
        "--lr 1e-3 --ema 0.1",
    ),
)


def main() -> None:
    drive(COMMANDS, "")


if __name__ == "__main__":
    main()
