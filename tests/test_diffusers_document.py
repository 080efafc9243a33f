"""The commands and the Python of docs/diffusers.md work as they stand there, on a pipeline that is smaller still."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from neon.model import load_model
from neon.settings import usual_settings
from tests.programs import ROOT, images
from tests.test_own_model import run

diffusers = pytest.importorskip("diffusers", reason="needs Python 3.11 and the extra diffusers")
pytest.importorskip("peft", reason="needs Python 3.11 and the extra diffusers")

DOCUMENT = (ROOT / "docs" / "diffusers.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)[0]
PYTHON = "".join(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))
BASE = "benchmarks/assets/small_diffusers"
UNSCORED = "--batch 16 --batch_gpu 16 --processes 1"
FEWER = {
    # So few images show no gain, and nothing would be written; without real images it is.
    "--real neon/demo/train-statistics.npz --report_real neon/demo/test-statistics.npz "
    "--features neon/demo/features.safetensors ": "",
    "--num_synthetic 1000 --training_images 6400": f"--num_synthetic 16 --training_images 32 {UNSCORED}",
    "--select_images 1000 ": "",
    "--num_steps 5": "--num_steps 2",
    "--num_steps 20": "--num_steps 2",
    "--num_images 100": "--num_images 10",
}


def small_unet() -> torch.nn.Module:
    """A network as that of the document, with fewer weights, and the same every time."""
    config = {**diffusers.UNet2DModel.load_config(ROOT / BASE / "unet"), "block_out_channels": (8, 16)}
    torch.manual_seed(0)
    return diffusers.UNet2DModel.from_config(config).eval()


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the document ran, with fewer steps and images."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "neon").symlink_to(ROOT / "neon")
    diffusers.DDIMPipeline(small_unet(), diffusers.DDIMScheduler()).save_pretrained(folder / BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS.splitlines():
            if "neon improve" in command:
                assert run(f"{command} --dry_run") == 0, command
        commands = COMMANDS
        for printed, fewer in FEWER.items():
            assert printed in commands
            commands = commands.replace(printed, fewer)
        for command in commands.splitlines():
            assert run(command) == 0, command
    return folder / "runs" / "diffusers"


def test_the_commands_of_the_document_run(walked: Path) -> None:
    sampled, labels = images(str(walked / "samples"))
    assert sampled.shape == (10, 1, 14, 14) and labels is not None
    for way in ("full", "lora"):
        assert usual_settings(load_model(walked / way / "improved-1")).num_steps == 2, "as it was asked for"


def test_diffusers_and_peft_open_what_was_written_as_the_document_does(
    walked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(walked.parent.parent)
    (walked / "full" / "improved-1").rename(walked / "full" / "improved")
    snapshot = max((walked / "lora" / "self-training").glob("snapshot-*.safetensors"))
    factors = f"-w 1 --output {walked}/lora/improved-lora --as-adapter --adapter-format peft"
    assert run(f"neon merge --base {BASE} --self-trained {snapshot} {factors}") == 0
    found: dict[str, Any] = {}
    exec(PYTHON, found)
    assert found["x"].shape == (10, 1, 14, 14) and found["x"].isfinite().all()
    merged = diffusers.DDIMPipeline.from_pretrained(walked / "lora" / "improved-1").unet
    x, t, labels = torch.randn(2, 1, 14, 14), torch.tensor([10, 500]), torch.tensor([3, 7])
    with torch.no_grad():
        expected, base = (unet(x, t, class_labels=labels).sample for unet in (merged, small_unet()))
        adapted = found["unet"](x, t, class_labels=labels).sample
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
