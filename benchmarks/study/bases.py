"""The bases that only the study uses: where they are there, they are not trained again.

PYTHONPATH=benchmarks python -m study.bases edm VAR flow    # 20, 10 and 1 minutes of one core
"""

import sys
from collections.abc import Callable

import small_var
import torch

from neon.checkpoint import load_state
from neon.demo import train as demo
from neon.model import architecture, save_model
from neon.recipe import Recipe
from neon.runtime.distributed import Processes
from neon.selftrain import train
from study.families import FAMILIES, flow


def edm_base() -> None:
    """The demo's base of seed 1."""
    demo.TrainBase(seed=1, output=FAMILIES["edm"]().bases[1])()


def var_base() -> None:
    """The small VAR of seed 1, with the tokenizer of seed 0; trained for a third of its time."""
    small_var.Prepare(seed=1, base_images=100_000, base=FAMILIES["VAR"]().bases[1])()


def flow_base(steps: int = 4000) -> None:
    """The flow of docs/examples, trained on half of the digits."""
    family = flow()
    assert family.kind is not None
    torch.manual_seed(0)
    model = architecture(family.kind)({"image_shape": [1, 8, 8], "width": 192, "depth": 3})
    snapshots = train(
        model,
        family.data().real(),
        small_var.ROOT / "runs" / "study" / "flow-base",
        num_steps=steps,
        snapshot_steps=[],
        recipe=Recipe(batch_size=128, lr=1e-3, lr_rampup_kimg=10, ema_halflife_kimg=20),
        seed=0,
        processes=Processes(),
        title="flow of digits",
    )
    save_model(family.bases[0], model, load_state(snapshots[-1].path))


TRAINED: dict[str, Callable[[], None]] = {"edm": edm_base, "VAR": var_base, "flow": flow_base}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TRAINED:
        if not FAMILIES[name]().bases[-1].exists():
            TRAINED[name]()
