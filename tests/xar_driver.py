"""xAR's programs one after the other in one process group, for the tests that start it in several processes."""

from tests.programs import drive
from xAR.calculate_fid import ScoreXAR
from xAR.finetune import TrainXAR
from xAR.sample import SampleXAR

# Neither the images nor the blocks nor the micro-batches divide by 2 or 3.
COMMANDS = (
    (SampleXAR, "--model_ckpt base.pth --outdir set --num_images 13 --batch_size 3 --flow_steps 3"),
    (
        ScoreXAR,
        "--model_ckpt base.pth --self_trained tuned.pth --w 0.5 --ref real.npz --features features.safetensors "
        "--num_images 20 --batch_size 3 --flow_steps 3 --json scores.json",
    ),
    (
        TrainXAR,
        "--model_ckpt base.pth --data real --outdir training --batch 16 --batch_gpu 4 --total_images 48 "
        "--save_interval 16 --lr 1e-3 --warmup_epochs 1",
    ),
)


def main() -> None:
    drive(COMMANDS, "--vae_path vae.ckpt")


if __name__ == "__main__":
    main()
