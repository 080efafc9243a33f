"""The small models that studies of the whole method run on: how each is sampled, self-trained and scored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import small_digits
from small_study import ASSETS, DATA, FEATURES, prepare_data, program, write_zip

from neon.demo.assets import BASE as DEMO_BASE
from neon.demo.assets import FEATURES as DEMO_FEATURES
from neon.demo.assets import TEST_STATISTICS, TRAIN_STATISTICS, real_images


@dataclass(frozen=True, kw_only=True)
class Study:
    """One small model: how it is sampled, self-trained and tuned."""

    architecture: str
    """whose programs are run"""
    base: Path
    flag: str
    """that names the network in the programs"""
    transfer: str = ""
    """the same in finetune.py, where it is another"""
    sample: str
    """flags of sample.py and calculate_fid.py for the sampler of S"""
    number: str
    """flags that ask for so many images"""
    train: str
    """flags of finetune.py"""
    settings: str
    """the sampler of S, as `--set` of `neon tune`"""
    guidance: tuple[float, ...]
    """of the grid; its ends are the range of the search"""
    features: Path = FEATURES
    select: Path = DATA / "train.npz"
    report: Path = DATA / "test.npz"
    real: Path = DATA / "test2000.zip"
    """test images, for precision and recall"""
    vae: str = ""
    """flags that name the autoencoder, in the programs"""
    tune_vae: str = ""
    """the same in `neon tune`"""
    prepare: Callable[[Path], None] = prepare_data
    """writes what is missing of the files above, from a folder with the four Fashion-MNIST files"""

    def self_trained(self, run: Path, num_synthetic: int) -> list[Path]:
        """Draw S and self-train on it into the folder `run`, or what is left of both; the snapshots by budget."""
        number = self.number.format(last=num_synthetic - 1, count=num_synthetic)
        network = f"{self.flag} {self.base} {self.vae}"
        program(self.architecture, "sample", f"{network} {self.sample} {number} --outdir {run}/S.zip --device cpu")
        network = f"{self.transfer or self.flag} {self.base} {self.vae}"
        trained = f"--data {run}/S.zip --outdir {run}/self {self.train} --device cpu"
        program(self.architecture, "finetune", f"{network} {trained}")
        return sorted((run / "self").glob("snapshot-*.safetensors"))


DEMO_REAL = DATA / "demo2000.zip"


def write_demo_images(_: Path) -> None:
    """The demo's real images as a zip; all else that scores it is in the package."""
    DATA.mkdir(parents=True, exist_ok=True)
    write_zip(DEMO_REAL, real_images(), None)


_DEMO = Study(
    architecture="edm",
    base=DEMO_BASE,
    flag="--network_pkl",
    transfer="--transfer",
    sample="--num_steps 5 --solver euler",
    number="--seeds 0-{last} --max_batch_size 100",
    train="--batch 128 --batch_gpu 32 --lr 1e-4 --lr_rampup 0 --ema 0 --augment 0 "
    "--duration 0.009600 --tick 3.2 --snap 1",
    settings="num_steps=5 solver=euler",
    guidance=(0.0, 0.25, 0.5, 1.0),
    features=DEMO_FEATURES,
    select=TRAIN_STATISTICS,
    report=TEST_STATISTICS,
    real=DEMO_REAL,
    prepare=write_demo_images,
)
STUDIES = {
    "edm": _DEMO,
    "VAR": Study(
        architecture="VAR",
        base=ASSETS / "small_var_base.safetensors",
        flag="--var_ckpt",
        sample="--top_k 0 --top_p 0 --cfg 1.5",
        number="--num_images {count} --batch_size 100",
        train="--batch 64 --batch_gpu 64 --target_lr 3e-5 --constant_lr --mid_reso 1 --total_images 9600 "
        "--save_interval 3200",
        settings="top_k=0 top_p=0 guidance=1.5",
        guidance=(0.0, 0.75, 1.5, 2.5),
        vae=f"--vae_ckpt {ASSETS}/small_var_tokenizer.safetensors",
        tune_vae=f"--vae {ASSETS}/small_var_tokenizer.safetensors",
    ),
    "xAR": Study(
        architecture="xAR",
        base=ASSETS / "small_xar_base.safetensors",
        flag="--model_ckpt",
        sample="--flow_steps 8 --cfg 1",
        number="--num_images {count} --batch_size 100",
        train="--batch 64 --batch_gpu 64 --lr 1e-4 --warmup_epochs 0 --ema_rate 0 --attn_dropout 0 --proj_dropout 0 "
        "--no_mirror --total_images 9600 --save_interval 3200",
        settings="num_steps=8 guidance=1",
        guidance=(1.0, 1.5, 2.0, 3.0),
    ),
    "imm": Study(
        architecture="imm",
        base=ASSETS / "small_imm_base.safetensors",
        flag="--network_pkl",
        sample="--num_steps 2 --cfg_scale 1.5",
        number="--num_images {count} --batch_size 100",
        train="--batch 64 --batch_gpu 64 --lr 1e-4 --ema_rate 0 --total_images 9600 --save_interval 3200",
        settings="num_steps=2 guidance=1.5",
        guidance=(1.0, 1.5, 2.0, 3.0),
    ),
    "digits": replace(
        _DEMO,
        base=small_digits.BASE,
        features=small_digits.FEATURES,
        select=small_digits.DATA / "train.npz",
        report=small_digits.DATA / "test.npz",
        real=small_digits.DATA / "test.zip",
        prepare=lambda _: small_digits.prepare_data(),
    ),
}
Name = Literal["edm", "VAR", "xAR", "imm", "digits"]
"""what a study is called on the command line"""
