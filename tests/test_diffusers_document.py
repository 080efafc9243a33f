"""The commands and the Python of docs/diffusers.md work as they stand there, on a pipeline that is smaller still."""

import json
import re
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs Python 3.11 and the extra diffusers")
pytest.importorskip("peft", reason="needs Python 3.11 and the extra diffusers")

from neon.checkpoint import load_state
from tests.programs import ROOT, images
from tests.test_own_model import run

DOCUMENT = (ROOT / "docs" / "diffusers.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)[0]
PYTHON = "".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))
BASE = "benchmarks/assets/small_diffusers"
FEWER = {
    "--num_synthetic 1000 --training_images 6400": "--num_synthetic 16 --training_images 32 --batch 16 --blocks 3",
    "--select_images 1000": "--select_images 70 --limit 2 --sampler_scores 2 --no_baselines --processes 1",
    "--num_steps 5": "--num_steps 2",
    "--num_steps 20": "--num_steps 2",
    "--num_images 100": "--num_images 10",
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the document ran, with fewer steps and images."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "neon"):
        (folder / name).symlink_to(ROOT / name)
    config = {**diffusers.UNet2DModel.load_config(ROOT / BASE / "unet"), "block_out_channels": (8, 16)}
    torch.manual_seed(0)
    pipeline = diffusers.DDIMPipeline(diffusers.UNet2DModel.from_config(config), diffusers.DDIMScheduler())
    pipeline.save_pretrained(folder / BASE)
    commands = COMMANDS
    for printed, fewer in FEWER.items():
        assert printed in commands
        commands = commands.replace(printed, fewer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands.splitlines():
            assert run(command) == 0, command
    return folder
