"""`neon doctor`: what it finds in folders of all kinds, and which findings keep the installation from working."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import neon.cli.doctor
from neon.checkpoint import save_safetensors
from neon.cli.app import main
from neon.cli.doctor import Launch, launch
from neon.metrics import Statistics
from neon.runtime.published_files import published_files
from tests import pickles
from tests.tiny import tiny_edm

ROOT = Path(__file__).parents[1]
STATISTICS = Statistics(mu=np.zeros(8), sigma=np.eye(8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, empty caches, and no processes to wait for."""
    for name in ("HOME", "TORCH_HOME", "NEON_CACHE", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "caches"))
    monkeypatch.delenv("NEON_MIRROR", raising=False)
    monkeypatch.setattr(neon.cli.doctor, "launch", lambda backend, n: Launch(backend=backend, processes=n, seconds=1.0))
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(__version__="0.40.0"))  # imports for seconds
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def pickled_network() -> bytes:
    """A small network in the layout of NVIDIA's files."""
    model = tiny_edm(0)
    return pickles.dumps(pickles.snapshot(model.network, model.config["network"]))


def states() -> dict[str, tuple[str, str | None, str]]:
    """What the JSON of `neon doctor` says of each file that is not missing, and of those begun."""
    assert main(["doctor", "--json", "doctor.json"]) == 0
    found = json.loads(Path("doctor.json").read_text())["findings"]
    return {
        item["file"]["name"]: (item["state"], item["path"], item["detail"])
        for item in found
        if item["state"] != "missing" or item["detail"]
    }


def test_an_empty_folder_has_gaps_and_no_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert states() == {}
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) < 40 and printed.err == ""
    assert lines[0].startswith(f"versions   neon {neon.__version__}  python 3.") and "diffusers 0.40.0" in lines[0]
    assert any(line.startswith("processes  2 with gloo: joined") for line in lines)
    assert lines[-1] == "the installation works"
    assert "  neon download  (17 files, about 18.5 GB)" in lines
    assert "  neon download --only VAR --base  (2 files, about 10.7 GB)" in lines
    [by_hand] = [line for line in lines if "no address is known" in line]
    assert "xAR-B.pth, xAR-L.pth, imagenet256_ts_a2.pkl" in by_hand and "var_d16" not in by_hand
    facts = json.loads(Path("doctor.json").read_text())
    assert facts["works"] is True and facts["faults"] == []
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["launches"] == [{"backend": "gloo", "processes": 2, "seconds": 1.0, "error": None}]
    assert [item["file"]["name"] for item in facts["findings"]] == [file.name for file in published_files()]
    assert all(free > 0 for free in facts["free_bytes"].values())


def test_files_are_found_wherever_programs_look_and_their_content_is_told(folder: Path) -> None:
    for name in ("checkpoints", "pretrained", "fid_stats", "imm/pretrained/sd-vae-ft-ema"):
        Path(name).mkdir(parents=True)
    weights = {"a": torch.zeros(1000, 300), "steps": torch.tensor(3)}
    torch.save({"model_ema": weights}, "checkpoints/Neon_xARB_imagenet256.pth")
    torch.save(weights, "pretrained/vae_ch160v4096z32.pth")
    Path("checkpoints/Neon_EDM_FFHQ.pkl").write_bytes(pickled_network())
    save_safetensors("imm/pretrained/sd-vae-ft-ema/diffusion_pytorch_model.safetensors", weights, {})
    Path("imm/pretrained/sd-vae-ft-ema/config.json").write_text('{"latent_channels": 4}')
    STATISTICS.save("fid_stats/adm_in256_stats.npz")
    found = states()
    pickled = found.pop("Neon_EDM_FFHQ.pkl")
    assert pickled[:2] == ("found", "checkpoints/Neon_EDM_FFHQ.pkl") and pickled[2].endswith(" M weights")
    sd = "imm/pretrained/sd-vae-ft-ema"
    assert found == {
        "Neon_xARB_imagenet256.pth": ("found", "checkpoints/Neon_xARB_imagenet256.pth", "0.3 M weights"),
        "vae_ch160v4096z32.pth": ("found", "pretrained/vae_ch160v4096z32.pth", "0.3 M weights"),
        "adm_in256_stats.npz": ("found", "fid_stats/adm_in256_stats.npz", "8 features"),
        "config.json": ("found", f"{sd}/config.json", "1 entries"),
        "diffusion_pytorch_model.safetensors": (
            "found",
            f"{sd}/diffusion_pytorch_model.safetensors",
            "0.3 M weights",
        ),
    }


def test_half_a_file_is_damaged_and_still_no_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("checkpoints").mkdir()
    Path("fid_stats").mkdir()
    torch.save({"a": torch.zeros(1000)}, "whole.pth")
    half = Path("whole.pth").read_bytes()[:2000]
    Path("checkpoints/Neon_VARd16_imagenet256.pth").write_bytes(half)
    Path("checkpoints/Neon_xARL_imagenet256.pth").write_text("<!DOCTYPE html><title>Log in</title>")
    Path("checkpoints/Neon_EDM_FFHQ.pkl").write_bytes(pickled_network()[:-100])
    Path("fid_stats/adm_in512_stats.npz").write_bytes(half)
    Path("kl16.ckpt").touch()
    Path("var_d16.pth.part").mkdir()
    found = states()
    assert found.pop("var_d16.pth") == ("missing", None, "begun")
    assert len(found) == 5 and {state for state, _, _ in found.values()} == {"damaged"}
    assert found["Neon_EDM_FFHQ.pkl"][1] == "checkpoints/Neon_EDM_FFHQ.pkl"
    assert found["adm_in512_stats.npz"][2].startswith("cannot be read as .npz statistics")
    assert found["kl16.ckpt"][2].startswith("the file is empty")
    assert found["Neon_VARd16_imagenet256.pth"][2].startswith("truncated or corrupt torch archive")
    assert found["Neon_xARL_imagenet256.pth"][2].startswith("an HTML page, not the weights")
    printed = capsys.readouterr().out
    assert "checkpoints/Neon_VARd16_imagenet256.pth  (DAMAGED: truncated or corrupt torch archive" in printed
    assert "missing: var_d16.pth (begun), var_d36.pth" in printed


@pytest.mark.parametrize("content", ["5", "[" * 100_000, "{", "\x00"])
def test_an_index_that_is_no_table_is_damaged(folder: Path, content: str) -> None:
    place = Path("imm/pretrained/sd-vae-ft-ema/config.json")
    place.parent.mkdir(parents=True)
    place.write_text(content)
    state, path, detail = states()["config.json"]
    assert (state, path) == ("damaged", str(place)) and detail.endswith("; download it again")


def test_a_whole_architecture_is_not_offered_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in published_files():
        if "edm" in file.architectures and file.kind != "base":
            path = Path(file.places[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".npz":
                STATISTICS.save(path)
            elif path.suffix == ".pkl":
                path.write_bytes(pickled_network())
            else:
                torch.save({"a": torch.zeros(1)}, path)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    offered = [name for name in ("edm", "VAR", "xAR", "imm") if f"neon download --only {name}  (" in printed]
    assert offered == ["VAR", "xAR", "imm"]


def test_a_missing_extra_is_a_gap(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["doctor"]) == 0
    assert "  pip install 'neon-extrapolation[imm]'  (diffusers is not installed)\n" in capsys.readouterr().out


def test_a_package_that_does_not_import_is_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken").mkdir()
    Path("broken/diffusers.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.delitem(sys.modules, "diffusers")
    monkeypatch.syspath_prepend("broken")
    assert main(["doctor", "--json", "doctor.json"]) == 1
    assert "import diffusers: RuntimeError: built for another torch; install it again" in capsys.readouterr().out
    facts = json.loads(Path("doctor.json").read_text())
    assert facts["works"] is False and facts["versions"]["diffusers"] is None


def test_torch_that_does_not_import_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "neon.cli", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr == ""
    assert "import torch: ImportError: libcudart.so.13: cannot open shared object file" in done.stdout


def test_processes_join_as_under_torchrun() -> None:
    done = launch("gloo", 2)
    assert done.error is None and done.processes == 2 and done.seconds > 0


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("echo starting; echo 'neon doctor: the ranks add up to 1' >&2; exit 1", "neon doctor: the ranks add up to 1"),
        ("echo 'RuntimeError: no interface'; echo 'ChildFailedError: x'; exit 1", "RuntimeError: no interface"),
        ("sleep 60", "have not joined after 0.2 s; does the name of this machine resolve to it?"),
    ],
)
def test_processes_that_do_not_join_are_a_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], launcher: str, reason: str
) -> None:
    Path("python").write_text(f"#!/bin/sh\n{launcher.replace('sleep', 'exec sleep')}\n")
    Path("python").chmod(0o755)
    monkeypatch.setattr(neon.cli.doctor, "launch", launch)
    monkeypatch.setattr(neon.cli.doctor, "LAUNCH_SECONDS", 0.2 if "sleep" in launcher else 60)
    monkeypatch.setattr(sys, "executable", str(Path("python").absolute()))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"  2 processes with gloo: {reason}\n" in printed
    assert printed.splitlines()[-1] == "the installation does not work"
