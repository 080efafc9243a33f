"""download_models.sh: what it fetches and where to, and everything that can go wrong on the way."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

import edm.published
import imm.published
import imm.vae
import VAR.published
import xAR.model
from neon.runtime.download import cached_path
from VAR.model import tokenizer_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "download_models.sh"
DOCUMENTS = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TOOLS = (
    *("awk", "bash", "cat", "curl", "cut", "df", "dirname", "find", "grep", "head", "mkdir", "mv", "od", "rm"),
    *("sha256sum", "tail", "tee", "tr", "wc"),
)
"""all that the script needs"""
SHORTEST = 14_000_000
"""bytes of statistics that are not too few"""
STATISTICS = b"PK\x03\x04" + bytes(range(256)) * (SHORTEST // 256) + b"PK\x05\x06" + bytes(18)
NOWHERE = "http://127.0.0.1:9"
"""a mirror that nobody serves; the internet is asked by no test"""
PAGE = b"\n<!DOCTYPE html><title>Please log in</title>"
HF = """#!/bin/bash
echo "$@" >> "$HOME/hf-calls"
if [ -n "$HF_SAYS" ]; then echo "$HF_SAYS" >&2; exit 1; fi
mkdir -p "$5"
if [ -n "$HF_PAGE" ]; then echo '<html>log in</html>' > "$5/$3"; exit; fi
case $3 in
    *.pkl) printf '\\200\\002' > "$5/$3"; truncate -s 1200M "$5/$3"; printf . >> "$5/$3" ;;
    *.json) echo '{}' > "$5/$3" ;;
    *.safetensors) printf '\\010\\0\\0\\0\\0\\0\\0\\0{' > "$5/$3"; truncate -s 200M "$5/$3" ;;
    *) printf 'PK\\003\\004' > "$5/$3"; truncate -s 1000M "$5/$3"; printf 'PK\\005\\006' >> "$5/$3" ;;
esac
"""
"""writes files of holes that begin and end as those of the names asked for"""


class Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012 - shared by all requests of a test, on purpose
    trouble: str = ""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        Handler.asked.append((self.path, wanted))
        content, trouble = STATISTICS, Handler.trouble
        if trouble == "missing":
            return self.send_error(404)
        if trouble == "page":
            content = PAGE
        start = 0 if wanted is None or trouble == "no ranges" else int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2 if trouble == "breaks" else None])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mirror of all files that do not come from Hugging Face."""
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Handler, "trouble", "")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("NEON_MIRROR", f"http://127.0.0.1:{http.server_port}")
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory and all caches in one empty folder; the tools that the script needs, and a stand-in hf."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in [*TOOLS, "truncate"]:
        found = shutil.which(tool)
        assert found, tool
        (tools / tool).symlink_to(found)
    (tools / "hf").write_text(HF)
    (tools / "hf").chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("HF_", "TORCH_HOME", "XDG_", "NEON_")):
            monkeypatch.delenv(name)
    environment = {"PATH": tools, "HOME": home, "no_proxy": "*", "NEON_MIRROR": NOWHERE}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(home)
    return home


def download(*flags: str, script: Path = SCRIPT, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = ["bash", str(script), *flags]
    # Python ignores the signal of too large a file, and so do its children: they see a failing write instead.
    return subprocess.run(command, capture_output=True, text=True, timeout=60, restore_signals=False, preexec_fn=limit)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"hf-calls"}


def table(*flags: str) -> dict[str, dict]:
    """The files that the script knows, by name."""
    done = download("--list", *flags)
    assert done.returncode == 0, done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        architectures, kind, megabytes, source, *places = line.split("\t")
        rows[Path(places[0]).name] = {
            "architectures": architectures, "kind": kind, "MB": megabytes, "source": source, "places": places
        }  # fmt: skip
    return rows


def only(reference: str, home: Path) -> Path:
    """Where one of EDM's statistics goes, with all other files of EDM in place, as far as they can be."""
    folder = home / ".cache" / "neon"
    places = {name: Path(row["places"][0]) for name, row in table("--only", "edm").items()}
    for name, path in places.items():
        if name.startswith("Neon"):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"\x80\x02")
            os.truncate(path, 120_000_000)
            with open(path, "ab") as file:
                file.write(b".")
        elif folder in path.parents and name != reference:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(STATISTICS)
    return places[reference]


def test_every_file_that_the_readme_names_is_fetched_to_where_it_names_it() -> None:
    named = set(re.findall(r"(?<!/)(?:checkpoints|fid_stats|xAR/pretrained)/[\w-]+\.\w+", DOCUMENTS))
    assert {"checkpoints/Neon_EDM_FFHQ.pkl", "fid_stats/adm_in256_stats.npz", "xAR/pretrained/kl16.ckpt"} <= named
    known = {row["places"][0] for row in table().values()}
    # Named by the published README; what was released is a .pkl.
    assert named - known == {"checkpoints/Neon_IMM_imagenet256.pth"}
    assert "checkpoints/Neon_imm_imagenet256.pkl" in known


def test_references_that_the_readme_names_by_address_are_fetched_to_where_programs_cache_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEON_MIRROR")
    urls = set(re.findall(r"https://nvlabs\S+\.npz", DOCUMENTS))
    rows = table()
    assert len(urls) == 2
    for url in urls:
        row = rows[Path(url).name]
        assert row["source"] == url and row["places"] == [str(cached_path(url))]


def test_base_models_are_those_of_the_published_tables_that_neon_improves() -> None:
    bases = {name for name, row in table("--base").items() if row["kind"] == "base"}
    assert bases == {
        *(f"{row.name}.pkl" for row in edm.published.PUBLISHED.values() if row.fid_neon is not None),
        *(f"{row.name}.pth" for row in VAR.published.PUBLISHED.values() if row.fid_neon is not None),
        *(f"{row.name}.pkl" for row in imm.published.PUBLISHED.values() if row.fid_neon is not None),
        "xAR-B.pth",
        "xAR-L.pth",
    }


def test_sizes_are_those_of_the_manifests() -> None:
    rows = table()
    manifests = {
        "edm/manifest_edm-cifar10-32x32-cond-vp": ["Neon_EDM_conditional_CIFAR10.pkl", "edm-cifar10-32x32-cond-vp.pkl"],
        "edm/manifest_edm-ffhq-64x64-uncond-vp": ["Neon_EDM_FFHQ.pkl", "edm-ffhq-64x64-uncond-vp.pkl"],
        "VAR/manifest_var_d16_256": ["Neon_VARd16_imagenet256.pth", "var_d16.pth"],
        "VAR/manifest_var_d36_512_saln": ["Neon_VARd36_imagenet512.pth", "var_d36.pth"],
        "VAR/manifest_vqvae_ch160_v4096_z32_256": ["vae_ch160v4096z32.pth"],
        "xAR/manifest_xar_base": ["Neon_xARB_imagenet256.pth", "xAR-B.pth"],
        "xAR/manifest_xar_large": ["Neon_xARL_imagenet256.pth", "xAR-L.pth"],
        "xAR/manifest_kl16_vae": ["kl16.ckpt"],
        "imm/manifest_im256": ["Neon_imm_imagenet256.pkl", "imagenet256_ts_a2.pkl"],
        "imm/manifest_sd_vae": ["diffusion_pytorch_model.safetensors"],
    }
    for manifest, names in manifests.items():
        tensors = json.loads((ROOT / "tests" / "golden" / f"{manifest}.json").read_text())
        del tensors["_meta"]
        elements = sum(math.prod(shape) for shape, _ in tensors.values())
        for name in names:
            assert int(rows[name]["MB"]) == round(4 * elements / 1e6), name


def test_the_programs_find_an_autoencoder_wherever_the_script_takes_it_as_present(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / ".cache/huggingface/hub"))
    rows = table()
    for name, lookup in (
        (VAR.published.TOKENIZER_FILE, tokenizer_file),
        (xAR.model.VAE_FILE, xAR.model.vae_file),
        (imm.vae.WEIGHTS_FILES[0], imm.vae.weights_file),
    ):
        assert len(rows[name]["places"]) == 4 - (name == VAR.published.TOKENIZER_FILE)
        for place in map(Path, rows[name]["places"]):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
            (place.parent / imm.vae.CONFIG_FILE).touch()
            found = lookup(None)
            assert found.samefile(place)
            found.unlink()
            (place.parent / imm.vae.CONFIG_FILE).unlink()
            if place.parent.name == imm.vae.FOLDER:
                place.parent.rmdir()
    assert rows[imm.vae.CONFIG_FILE]["places"] == [
        str(Path(place).with_name(imm.vae.CONFIG_FILE)) for place in rows[imm.vae.WEIGHTS_FILES[0]]["places"]
    ]
    assert rows[imm.vae.CONFIG_FILE]["source"] == f"hf:{imm.vae.REPOSITORY}"


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME", "HOME"])
def test_inception_goes_to_where_torch_fidelity_caches_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("NEON_MIRROR")
    monkeypatch.setenv(variable, str(home / "elsewhere"))
    row = table()[Path(URL_INCEPTION_V3).name]
    assert row["source"] == URL_INCEPTION_V3
    assert row["places"] == [str(Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name))]


def test_a_dry_run_lists_files_and_touches_nothing(home: Path) -> None:
    done = download("--dry-run", "--base")
    assert done.returncode == 0
    for name, row in table("--base").items():
        [line] = [line for line in done.stdout.splitlines() if f"{name}  " in line]
        assert line.split() == ["missing", row["MB"], "MB", row["places"][0], row["source"]]
    assert files(home) == set() and not (home / "hf-calls").exists()


def test_one_architecture_is_fetched_whole_and_a_second_run_skips_it(home: Path, server: str) -> None:
    done = download("--only", "xAR")
    assert "failed: 1" in done.stdout  # Inception: its hash cannot be forged
    fetched = {"checkpoints/Neon_xARB_imagenet256.pth", "checkpoints/Neon_xARL_imagenet256.pth"}
    fetched |= {"xAR/pretrained/kl16.ckpt", "fid_stats/adm_in256_stats.npz"}
    assert files(home) == fetched
    calls = (home / "hf-calls").read_text().splitlines()
    assert sorted(call.split()[:3] for call in calls) == [
        ["download", "sinaalemohammad/Neon", "Neon_xARB_imagenet256.pth"],
        ["download", "sinaalemohammad/Neon", "Neon_xARL_imagenet256.pth"],
        ["download", "sinaalemohammad/Neon", "adm_in256_stats.npz"],
        ["download", "xwen99/mar-vae-kl16", "kl16.ckpt"],
    ]
    again = download("--only", "xAR")
    assert "present: 4, fetched: 0, failed: 1" in again.stdout
    assert (home / "hf-calls").read_text().splitlines() == calls


def test_files_without_a_known_address_say_who_publishes_them_and_come_from_a_mirror(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored = "imagenet256_ts_a2.pkl  http://mirror/folder/imagenet256_ts_a2.pkl"
    monkeypatch.setenv("NEON_MIRROR", "http://mirror/folder/")
    assert mirrored in download("--dry-run", "--base").stdout
    monkeypatch.delenv("NEON_MIRROR")
    (home.parent / "tools" / "curl").unlink()
    done = download("--only", "imm", "--base")
    assert done.returncode == 1
    assert "imagenet256_ts_a2.pkl: published by IMM, but this project knows no address of it; save it as" in done.stderr
    assert "curl is not installed" in done.stderr  # for Inception


def test_an_interrupted_transfer_goes_on_where_it_was(home: Path, server: str) -> None:
    path, half = only("cifar10-32x32.npz", home), len(STATISTICS) // 2
    Handler.trouble = "breaks"
    done = download("--only", "edm")
    assert done.returncode == 1 and not path.exists()
    assert f"cifar10-32x32.npz: broken off after {half} bytes" in done.stderr
    assert path.with_name(f"{path.name}.part").read_bytes() == STATISTICS[:half]
    Handler.trouble = ""
    Handler.asked.clear()
    download("--only", "edm")
    assert Handler.asked[0] == ("/cifar10-32x32.npz", f"bytes={half}-")
    assert path.read_bytes() == STATISTICS and not path.with_name(f"{path.name}.part").exists()


@pytest.mark.parametrize(("trouble", "kept"), [("no ranges", 1000), ("", len(STATISTICS))])
def test_a_transfer_that_the_server_cannot_continue_starts_anew(
    home: Path, server: str, trouble: str, kept: int
) -> None:
    path = only("ffhq-64x64.npz", home)
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.part").write_bytes(bytes(kept))
    Handler.trouble = trouble
    download("--only", "edm")
    assert path.read_bytes() == STATISTICS


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("missing", "there is no such file any more (HTTP 404)"), ("page", "an HTML page in its place (a login page?)")],
)
def test_what_a_server_answers_instead_of_a_file_is_said_and_not_kept(
    home: Path, server: str, trouble: str, message: str
) -> None:
    path = only("cifar10-32x32.npz", home)
    Handler.trouble = trouble
    done = download("--only", "edm")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "cifar10" in line]
    assert line == f"failed   {path}: {server}/cifar10-32x32.npz: {message}" + "; check for a new address" * (
        trouble == "missing"
    )
    assert f"  {line.removeprefix('failed   ')}\n" in done.stdout  # the summary
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_is_said_and_what_came_is_kept(home: Path, server: str) -> None:
    path = only("cifar10-32x32.npz", home)
    done = download("--only", "edm", largest_file=1_000_000)
    assert done.returncode == 1
    assert f"writing {path}.part failed, the disk is full" in done.stderr
    assert path.with_name(f"{path.name}.part").stat().st_size == 1_000_000


def test_too_small_a_disk_is_said_before_anything_is_fetched(home: Path, server: str) -> None:
    path = only("cifar10-32x32.npz", home)
    df = home.parent / "tools" / "df"
    df.unlink()
    df.write_text("#!/bin/bash\nprintf 'Filesystem blocks used available\\nx 100 90 2000\\n'\n")
    df.chmod(0o755)
    done = download("--only", "edm")
    assert f"{path}: the disk is full: about 34 MB to come, 2 MB free" in done.stderr
    assert Handler.asked == [] and not (home / "hf-calls").exists()


def test_no_network_is_said_and_a_server_is_not_asked_twice(home: Path) -> None:
    done = download("--only", "edm")
    lines = [line for line in done.stderr.splitlines() if "no connection" in line]
    assert len(lines) == 3  # two statistics, Inception
    assert "check the network, run again to go on" in lines[0]
    assert all(line.endswith(f"no connection to {NOWHERE}/, as before") for line in lines[1:])


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("Error: File not found in repository 'x'.\nURL: x", "not in the repository sinaalemohammad/Neon"),
        ("Error: Model 'x' not found.\nIf the repo is private", "no repository sinaalemohammad/Neon, or not for you"),
        ("OSError: [Errno 28] No space left on device", "the disk is full ("),
        ("50%|### | 401M/803M\nthe server went away", "hf failed (the server went away); run again to go on"),
    ],
)
def test_a_failure_of_hf_is_told_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, says: str, message: str
) -> None:
    monkeypatch.setenv("HF_SAYS", says)
    done = download("--only", "imm")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("failed") and "Neon_imm" in line]
    assert line.startswith("failed   checkpoints/Neon_imm_imagenet256.pkl: ") and message in line
    assert files(home) == set()


def test_hugging_face_is_not_asked_again_without_a_connection(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SAYS", "Error: Local entry not found. [Errno 111] Connection refused")
    done = download("--only", "imm")
    assert done.stderr.count("no connection to Hugging Face") == 4
    assert len((home / "hf-calls").read_text().splitlines()) == 1


def test_a_page_from_hf_is_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PAGE", "1")
    done = download("--only", "imm")
    assert "sinaalemohammad/Neon: an HTML page in its place" in done.stderr
    assert files(home) == set()


def test_no_hf_says_which_command_installs_it(home: Path) -> None:
    (home.parent / "tools" / "hf").unlink()
    alone = home / "download_models.sh"
    shutil.copy(SCRIPT, alone)  # away from a .venv that may hold one
    done = download("--only", "xAR", script=alone)
    assert done.returncode == 1
    assert done.stderr.count("hf is not installed; install it with `pip install huggingface_hub`") == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (STATISTICS[:-22], "cut short, no end of archive"),
        (PAGE, "an HTML page in its place"),
        (b"", "an empty file"),
        (b"PK\x03\x04PK\x05\x06", "only 8 bytes, expected about 34 MB"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer in its place"),
        (b"\x93NUMPY", "not a .npz file, it begins with the bytes 934e554d"),
    ],
)
def test_a_file_that_is_there_but_not_whole_is_seen(home: Path, content: bytes, message: str) -> None:
    path = Path("fid_stats/adm_in512_stats.npz")
    path.parent.mkdir()
    path.write_bytes(content)
    assert f"({path}: {message}" in download("--dry-run", "--only", "VAR").stdout


def test_a_file_that_is_there_but_not_whole_is_fetched_again(home: Path, server: str) -> None:
    path = only("cifar10-32x32.npz", home)
    path.parent.mkdir(parents=True)
    path.write_bytes(STATISTICS[:-22])
    download("--only", "edm")
    assert path.read_bytes() == STATISTICS


def test_weights_of_another_hash_than_their_name_says_are_not_taken(home: Path) -> None:
    [place] = table()[Path(URL_INCEPTION_V3).name]["places"]
    Path(place).parent.mkdir(parents=True)
    Path(place).write_bytes(b"PK\x03\x04PK\x05\x06")
    os.truncate(place, 50_000_000)
    with open(place, "ab") as file:
        file.write(b"PK\x05\x06")
    assert "its SHA-256 does not begin with 6726825d, as its name says" in download("--dry-run", "--only", "edm").stdout


@pytest.mark.parametrize("flags", [["--only", "EDM2"], ["--only"], ["--bases"], ["edm"]])
def test_a_wrong_flag_is_refused(home: Path, flags: list[str]) -> None:
    done = download(*flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "expected" in done.stderr
    assert files(home) == set()


def test_help_shows_every_flag() -> None:
    done = download("--help")
    assert done.returncode == 0
    for flag in ("--only", "--base", "--dry-run", "--list", "HF_ENDPOINT", "NEON_MIRROR"):
        assert flag in done.stdout
