"""Train a small tokenizer on images of your own; the published one needs no training.

    python VAR/train_tokenizer.py --data images.zip --outdir runs/tokenizer --base_channels 32 --channel_mult 1 2 \\
        --patch_nums 1 2 4 8 --vocab 128 --code_channels 8 --total_images 200000

Squared error of reconstructions and the quantiser's own loss; no perceptual or adversarial loss, so this suits
small images. The averaged weights appear as snapshots. A killed run goes on where it was.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from neon import __version__
from neon.cli.command_line import at_least_one, run_program, values_refused
from neon.cli.flags import Device, Log, Switch
from neon.errors import RequestError
from neon.runtime.trackers import check_installed


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train a small tokenizer on images.

    Example: python VAR/train_tokenizer.py --data images.zip --outdir runs/tokenizer --base_channels 32
    """

    data: Path
    """folder or zip of images with three channels"""
    outdir: Path
    """folder of snapshots, log and state"""
    vocab: int = 4096
    """codes"""
    code_channels: int = 32
    """channels of a code"""
    base_channels: int = 160
    """channels of the finest level, a multiple of 32"""
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """channels of each level, in multiples of the first; each level but the last halves the resolution"""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """side lengths of the scales"""
    batch: int = 64
    """images per step"""
    lr: float = 1e-3
    """learning rate"""
    total_images: int = 200_000
    """budget"""
    state_every: float = 60.0
    """seconds between saves of the state of the run"""
    seed: int = 0
    """of initial weights and data order"""
    log: Log = None
    """also send the curves to a tracker"""
    fresh: bool = False
    """start anew, replacing a run that is in the folder"""
    device: Device = None
    """by default a GPU where there is one"""
    tf32: Switch = None
    """whether a GPU may round the inputs of products to TF32; by default it does not"""

    def __call__(self) -> None:
        import torch

        from neon.data.fingerprint import fingerprint
        from neon.data.shards import open_images
        from neon.precision import FP32, decide
        from neon.recipe import Recipe
        from neon.runtime.distributed import processes
        from neon.selftrain import largest_divisor, train_in_folder
        from VAR.tokenizer import TokenizerModel

        check_installed(self.log)
        at_least_one(batch=self.batch, total_images=self.total_images)
        names = ("vocab", "code_channels", "base_channels", "channel_mult", "patch_nums")
        config = {name: getattr(self, name) for name in names}
        config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
        torch.manual_seed(self.seed)
        try:
            model = TokenizerModel(config)
        except ValueError as error:
            raise RequestError(f"no such tokenizer can be built ({error})") from error
        with values_refused():
            recipe = Recipe(batch_size=self.batch, lr=self.lr, ema_halflife_kimg=self.batch / 20)
        with processes(self.device) as group:
            model.precision = decide(None, FP32, group.device, self.tf32)
            rounded = {} if model.precision == FP32 else model.precision.recorded
            train_in_folder(
                model.to(group.device),
                open_images(self.data),
                self.outdir,
                record={
                    "neon": __version__,
                    "config": config,
                    **rounded,
                    "recipe": recipe.facts(),
                    "seed": self.seed,
                    "data_fingerprint": group.on_main(lambda: fingerprint(self.data)),
                },
                fresh=self.fresh,
                num_steps=-(-self.total_images // self.batch),
                snapshot_steps=[],
                recipe=recipe,
                seed=self.seed,
                processes=group,
                micro_batch=largest_divisor(self.batch, 32),
                state_every_seconds=self.state_every,
                title="tokenizer",
                log=self.log,
            )


if __name__ == "__main__":
    sys.exit(run_program(TrainTokenizer))
