"""Merges in another dtype than the base's, and stochastic rounding."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from neon.checkpoint import load_state, open_checkpoint, save_safetensors
from neon.cli.app import main
from neon.errors import DegenerateError, RequestError
from neon.merge import Precision, merge_files, merge_folders
from neon.merge.precision import round_stochastically
from tests.tiny import pair

STOCHASTIC = Precision(rounding="stochastic")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base and tuned, a hundredth of a step of bfloat16 apart, as files and as the folders of a model in shards."""
    monkeypatch.chdir(tmp_path)
    base, _ = pair(torch.bfloat16, (250, 250))
    other = {"bn.running_var": torch.ones(3), "steps": torch.tensor(3)}
    for side, moved in (("base", 0.0), ("tuned", 5e-5)):
        weights = {"one.weight": base.float() + moved * base.float().abs(), "two.weight": base.float().T.contiguous()}
        Path(side).mkdir()
        state = {name: tensor.bfloat16() if side == "base" else tensor for name, tensor in weights.items()} | other
        save_safetensors(f"{side}.safetensors", state, {"format": "pt"})
        save_safetensors(Path(side) / "model.safetensors", state, {"format": "pt"})
        config = {"architectures": ["A"], "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}, "dtypes": 1}
        Path(side, "config.json").write_text(json.dumps(config))
    return tmp_path


def exact(w: float = 1.0) -> torch.Tensor:
    base, tuned = (load_state(f"{side}.safetensors")["one.weight"].double() for side in ("base", "tuned"))
    return (1 + w) * base - w * tuned


@pytest.mark.parametrize("output", ["neon.safetensors", "neon.pth"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_dtype_and_what_is_copied_stays(here: Path, output: str, dtype: str) -> None:
    [report] = merge_files("base.safetensors", "tuned.safetensors", [1.0], output, precision=Precision(dtype=dtype))  # type: ignore[arg-type]
    state = load_state(output)
    assert state["one.weight"].dtype == state["two.weight"].dtype == getattr(torch, dtype)
    assert state["bn.running_var"].dtype == torch.float32 and state["steps"].dtype == torch.int64
    wide = exact().to(torch.float32)  # as the merge is computed
    tolerance = {"float32": 1e-7, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    torch.testing.assert_close(state["one.weight"].float(), wide, rtol=tolerance, atol=1e-7)
    assert (report.share_kept > 0.99) == (report.relative_error < 0.01) == (dtype == "float32")


def test_a_smaller_dtype_than_the_base_s_loses_what_its_rounding_loses(here: Path) -> None:
    wide = {side: load_state(f"{side}.safetensors")["one.weight"].float() for side in ("base", "tuned")}
    for side, tensor in wide.items():
        save_safetensors(f"{side}32.safetensors", {"w": tensor + 1e-3 * tensor.abs()}, {})
    precision = Precision(dtype="bfloat16")
    [report] = merge_files("base32.safetensors", "tuned32.safetensors", [1.0], "a.safetensors", precision=precision)
    assert report.share_lost > 0.9


def test_stochastic_rounding_is_right_on_average_where_nearest_loses_all(here: Path) -> None:
    nearest, drawn = (
        merge_files("base.safetensors", "tuned.safetensors", [1.0], f"{i}.safetensors", precision=precision)[0]
        for i, precision in enumerate((Precision(), STOCHASTIC))
    )
    assert nearest.share_kept == 0 and nearest.share_lost == 1
    assert drawn.share_kept == pytest.approx(1, abs=0.3)
    assert "--dtype float32 keeps it, --rounding stochastic" in nearest.warnings[0]
    assert "stochastic rounding adds noise" in drawn.warnings[0]
    assert open_checkpoint("1.safetensors").metadata["rounding_seed"] == "0"
    assert "rounding" not in open_checkpoint("0.safetensors").metadata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, -3.0])
def test_stochastic_rounding_is_unbiased_between_neighbours_and_keeps_what_fits(
    dtype: torch.dtype, scale: float
) -> None:
    value, count = torch.tensor(1.2345 * scale), 40_000
    values, out = value.repeat(count), torch.empty(count, dtype=dtype)
    round_stochastically(values, out, "w", 5, 0)
    low, high = out.float().min(), out.float().max()
    assert low < value < high and set(out.float().tolist()) == {low.item(), high.item()}
    noise = (high - low) / 2 / count**0.5
    assert abs(out.double().mean() - value.double()) < 4 * noise
    kept = out.float()
    round_stochastically(kept, out, "w", 0, 1)
    assert torch.equal(out.float(), kept)


def test_draws_depend_on_seed_name_and_place_and_on_no_piece() -> None:
    values = torch.linspace(-3, 3, 100_001)

    def rounded(*cuts: int, name: str = "w", seed: int = 0) -> torch.Tensor:
        out = torch.empty(len(values), dtype=torch.bfloat16)
        ends = [0, *cuts, len(values)]
        for a, b in itertools.pairwise(ends):
            round_stochastically(values[a:b], out[a:b], name, a, seed)
        return out

    whole = rounded()
    assert torch.equal(whole, rounded(1, 7, 40_003)) and torch.equal(whole, rounded(64, 65_536))
    assert not torch.equal(whole, rounded(seed=1)) and not torch.equal(whole, rounded(name="v"))


def test_values_that_are_not_finite_stay_and_overflow_is_an_error() -> None:
    values, out = torch.tensor([torch.inf, torch.nan, 0.0, -0.0, 65504.0]), torch.empty(5, dtype=torch.float16)
    round_stochastically(values, out, "w", 0, 0)
    assert torch.equal(out.float().nan_to_num(9.0, torch.inf), values.nan_to_num(9.0, torch.inf))
    with pytest.raises(DegenerateError, match="1 elements overflow"):
        round_stochastically(torch.tensor([1e5]), torch.empty(1, dtype=torch.float16), "w", 0, 0)


def test_a_folder_says_the_dtype_that_its_weights_have(here: Path) -> None:
    merge_folders("base", "tuned", [1.0], "neon", precision=Precision(dtype="float32"))
    config = json.loads(Path("neon/config.json").read_text())
    assert config == {
        "architectures": ["A"],
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32"},
        "dtypes": 1,
    }
    torch.testing.assert_close(load_state("neon/model.safetensors")["one.weight"], exact().float())


def test_folders_and_files_draw_alike_whatever_the_shards(here: Path) -> None:
    merge_folders("base", "tuned", [1.0], "neon", precision=STOCHASTIC, shard_size="150KB")
    merge_files("base.safetensors", "tuned.safetensors", [1.0], "neon.safetensors", precision=STOCHASTIC)
    shards, alone = load_state("neon"), load_state("neon.safetensors")
    assert len(list(Path("neon").glob("*.safetensors"))) > 1
    assert all(torch.equal(shards[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "3"], "--seed: is of --rounding stochastic"),
        (["--rounding", "stochastic", "--dtype", "float32"], "--dtype is float32"),
        (["--dtype", "int8"], "int8"),
        (["--dtype", "float32", "--as-adapter"], "--dtype: is of weights"),
    ],
)
def test_what_makes_no_sense_is_refused(
    here: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "--base", "base.safetensors", "--self-trained", "tuned.safetensors", "-w", "1"]
    assert main([*command, "--output", "neon.safetensors", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("neon.safetensors").exists()


def test_float32_results_are_not_rounded_stochastically(here: Path) -> None:
    with pytest.raises(RequestError, match="no merged tensor of the base has them"):
        merge_files("tuned.safetensors", "base.safetensors", [1.0], "neon.safetensors", precision=STOCHASTIC)
