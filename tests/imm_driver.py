"""IMM's programs one after the other in one process group, for the tests that start it in several processes."""

from imm.calculate_fid import ScoreIMM
from imm.encode import EncodeForIMM
from imm.finetune import TrainIMM
from imm.sample import SampleIMM
from tests.programs import drive

# Neither the images nor the blocks nor the micro-batches divide by 2 or 3.
COMMANDS = (
    (
        SampleIMM,
        "--network_pkl base.pkl --outdir set --num_images 13 --batch_size 3 --num_steps 2 --cfg_scale 2",
    ),
    (
        ScoreIMM,
        "--network_pkl base.pkl --self_trained tuned.pkl --w 0.5 --ref real.npz "
        "--features features.safetensors --num_images 20 --batch_size 3 --num_steps 2 --json scores.json",
    ),
    (EncodeForIMM, "--data real --outdir latents --img_size 16 --batch_size 7"),
    (
        TrainIMM,
        "--network_pkl base.pkl --data real --outdir training --batch 24 --batch_gpu 4 "
        "--total_images 72 --save_interval 24 --lr 1e-3 --ema_rate 0.9",
    ),
)


def main() -> None:
    drive(COMMANDS, "--vae_path vae")


if __name__ == "__main__":
    main()
