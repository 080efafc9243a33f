"""The golden tests read other cases of the same kinds: NEON_GOLDEN_DIR names a folder of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.goldens import number_in, subset

ROOT = Path(__file__).parent.parent


class Cases:
    """A folder of altered copies of recorded cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recorded(self, architecture: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A case and its arrays, to alter."""
        folder = ROOT / "tests/golden" / architecture
        case = json.loads((folder / "golden.json").read_text())["cases"][name]
        with np.load(folder / case["file"]) as arrays:
            return case, dict(arrays)

    def add(self, architecture: str, name: str, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        folder = self.folder / architecture
        folder.mkdir(exist_ok=True)
        index = folder / "golden.json"
        file = json.loads(index.read_text()) if index.exists() else {"cases": {}}
        file["cases"][name] = {**case, "file": f"{name}.npz"}
        index.write_text(json.dumps(file))
        np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)

    def run(self) -> dict[str, bool]:
        """Which of them pass, by name."""
        report = self.folder / "report.xml"
        tests = [f"tests/test_golden_{path.name}.py::test_golden" for path in self.folder.iterdir()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests],
            cwd=ROOT, env={**os.environ, "NEON_GOLDEN_DIR": str(self.folder)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return {
            case.attrib["name"].removeprefix("test_golden[").removesuffix("]"): case.find("failure") is None
            for case in ElementTree.parse(report).iter("testcase")
        }


def without_classes(cases: Cases) -> None:
    for architecture, name, labels, images in (
        ("edm", "sampler_edm18_uncond", "class_labels", "latents"),
        ("edm", "ddpmpp_uncond", "class_labels", "x"),
        ("edm", "loss_edm_uncond", "labels", "images_u8"),
        ("imm", "songunet_a", "in_labels", "in_x"),
        ("imm", "sampler_unet", "in_labels", "in_z"),
        ("imm", "loss_unet", "in_labels", "in_images"),
    ):
        case, arrays = cases.recorded(architecture, name)
        assert labels not in arrays
        arrays[labels] = np.zeros((len(arrays[images]), 0), np.float32)
        cases.add(architecture, f"classless_{name}", case, arrays)


def training_without_classes(cases: Cases) -> None:
    """No such run is recorded: tolerances are such that it need only come to an end."""
    case, arrays = cases.recorded("edm", "train_loop_cond")
    case["config"]["label_dim"] = 0
    kept = [not name.startswith("model.map_label.") for name in case["param_names"]]
    case["param_names"] = [name for name, keep in zip(case["param_names"], kept, strict=True) if keep]
    for side in ("net", "ema"):
        arrays[f"{side}_delta_norm"] = arrays[f"{side}_delta_norm"][kept]
    arrays["labels"] = arrays["labels"][..., :0]
    cases.add("edm", "classless_training_edm", {**case, "atol": 1e6}, arrays)
    case, arrays = cases.recorded("imm", "finetune_dit")
    case["config"]["precond"]["label_dim"] = 0
    case["tolerance"] = {"losses_rtol": 1e6, "deltas": "atol = 1000000 * max|array|"}
    arrays = {name: array for name, array in arrays.items() if not name.startswith("in_u_label")}
    arrays["in_labels"] = arrays["in_labels"][:, :0]
    cases.add("imm", "classless_training_imm", case, arrays)


def without_numbers_in_words(cases: Cases) -> None:
    for architecture, name in (("edm", "sampler_fp32_two_networks"), ("edm", "ncsnpp_uncond"), ("xAR", "layout")):
        case, arrays = cases.recorded(architecture, name)
        cases.add(architecture, f"wordless_{name}", {**case, "what": "as ever", "weights": "by the recipe"}, arrays)
    for architecture, name, group in (("VAR", "forward_plain", "grads"), ("imm", "loss_dit_m2", "grad_entries")):
        case, arrays = cases.recorded(architecture, name)
        case["tolerance"][group] = "relative to the largest entry"
        case.pop("weights", None)
        cases.add(architecture, f"wordless_{name}", case, arrays)


def thinned(cases: Cases) -> None:
    def thin(architecture: str, source: str, array: str, step: int, *axes: int, wrong: float = 0) -> None:
        case, arrays = cases.recorded(architecture, source)
        part = [slice(None, None, step if axis in axes else None) for axis in range(arrays[array].ndim)]
        arrays[f"{array}_sub"] = arrays.pop(array)[tuple(part)] + np.float32(wrong)
        case["stride"] = {**case.get("stride", {}), f"{array}_sub": step}
        cases.add(architecture, f"wrong_{source}" if wrong else f"thin_{source}", case, arrays)

    thin("VAR", "forward_plain", "logits", 3, 1)
    thin("VAR", "forward_train_mode", "logits", 5, 2)
    thin("VAR", "sample_greedy_nocfg", "logits", 4, 1, 2)
    thin("VAR", "forward_eval_drop", "logits", 3, 1, wrong=1e-3)
    thin("edm", "ddpmpp_uncond", "raw_F", 2, 2, 3)
    thin("xAR", "rmsnorm", "out:plain", 2, 1)
    thin("imm", "dit_options", "out_patches", 3, 2)


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Altered cases and whether they pass, run in one process."""
    cases = Cases(tmp_path_factory.mktemp("golden"))
    for alter in (without_classes, training_without_classes, without_numbers_in_words, thinned):
        alter(cases)
    return cases.run()


def of_kind(passed: dict[str, bool], kind: str) -> list[bool]:
    return [good for name, good in passed.items() if name.startswith(f"{kind}_")]


def test_labels_without_entries_are_no_class(passed: dict[str, bool]) -> None:
    """As the originals record them where a network knows no classes."""
    assert of_kind(passed, "classless") == [True] * 8


def test_texts_without_numbers_mean_those_of_the_recorded_cases(passed: dict[str, bool]) -> None:
    assert of_kind(passed, "wordless") == [True] * 5


def test_every_nth_entry_is_compared_where_no_more_is_stored(passed: dict[str, bool]) -> None:
    assert of_kind(passed, "thin") == [True] * 6
    assert of_kind(passed, "wrong") == [False]


def test_a_subset_is_of_the_axes_that_are_longer_or_of_all_entries() -> None:
    whole = np.arange(24).reshape(4, 6)
    assert subset(whole, (4, 2), 3).tolist() == whole[:, ::3].tolist()
    assert subset(whole, (2, 3), 2).tolist() == whole[::2, ::2].tolist()
    assert subset(whole, (5,), 5).tolist() == [0, 5, 10, 15, 20]


def test_a_number_is_read_from_words_or_is_the_usual_one() -> None:
    assert number_in("all times 0.5 in float32", r"times (\d\.\d+)", 0.97) == 0.5
    assert number_in("scaled", r"times (\d\.\d+)", 0.97) == 0.97
