"""VAR's programs one after the other in one process group, for the tests that start it in several processes."""

from tests.programs import drive
from VAR.calculate_fid import ScoreVAR
from VAR.finetune import TrainVAR
from VAR.sample import SampleVAR

# Neither the images nor the blocks nor the micro-batches divide by 2 or 3.
COMMANDS = (
    (SampleVAR, "--var_ckpt base.pth --outdir set --num_images 13 --batch_size 3 --top_k 9"),
    (SampleVAR, "--var_ckpt base.pth --outdir tokens --num_images 13 --batch_size 3 --top_k 9 --tokens"),
    (
        ScoreVAR,
        "--var_ckpt base.pth --self_trained tuned.pth --w 0.5 --ref real.npz --features features.safetensors "
        "--num_images 20 --batch_size 3 --top_k 9 --json scores.json",
    ),
    (
        TrainVAR,
        "--var_ckpt base.pth --data tokens --outdir training --batch 16 --batch_gpu 4 --total_images 48 "
        "--save_interval 16 --target_lr 1e-3",
    ),
)


def main() -> None:
    drive(COMMANDS, "--vae_ckpt vae.pth")


if __name__ == "__main__":
    main()
