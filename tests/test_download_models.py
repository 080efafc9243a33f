"""`neon download`, download_models.sh: what they fetch and where to, and what can go wrong on the way."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from neon.cli.app import main
from neon.runtime.download import cached_path
from VAR.model import tokenizer_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "download_models.sh"
DOCUMENTS = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SHORTEST = 14_000_000
"""bytes of statistics that are not too few"""
STATISTICS = b"PK\x03\x04" + bytes(range(256)) * (SHORTEST // 256) + b"PK\x05\x06" + bytes(18)
VERSION = '"1"'
NOWHERE = "http://127.0.0.1:9"
"""a mirror that nobody serves; the internet is asked by no test"""
REFERENCES = ("cifar10-32x32.npz", "ffhq-64x64.npz")
PAGE = b"\n<!DOCTYPE html><title>Please log in</title>"


class Handler(BaseHTTPRequestHandler):
    """A mirror of the files that do not come from Hugging Face."""

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
        self.send_header("ETag", VERSION)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2 if trouble in ("breaks", "hangs") else None])
        while Handler.trouble == "hangs":
            time.sleep(0.01)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Hub(BaseHTTPRequestHandler):
    """A stand-in for Hugging Face, whose files begin and end as those of their names."""

    asked: list[str] = []  # noqa: RUF012 - as above; addresses of files
    refusal: str | None = None
    """the X-Error-Code with which all files are refused"""
    page: bool = False

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        repository, _, name = self.path.strip("/").partition("/resolve/main/")
        if not name:  # huggingface_hub asks for this and that
            return self.send_error(404)
        if self.command == "HEAD":
            Hub.asked.append(f"{repository} {name}")
        if Hub.refusal is not None:
            self.send_response(400 if Hub.refusal == "Closed" else 404)
            self.send_header("X-Error-Code", Hub.refusal)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        begin, zeros, end = (b"\x80\x02", 100_000_000, b".") if name.endswith(".pkl") else (STATISTICS, 0, b"")
        if Hub.page:
            begin, zeros, end = PAGE, 0, b""
        self.send_response(200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(begin) + zeros + len(end)))
        self.end_headers()
        if self.command == "GET":
            for part in (begin, *[bytes(1_000_000)] * (zeros // 1_000_000), end):
                self.wfile.write(part)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Handler, "trouble", "")
    with served(Handler) as address:
        monkeypatch.setenv("NEON_MIRROR", address)
        yield address


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "refusal", None)
    monkeypatch.setattr(Hub, "page", False)
    with served(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory and all caches in one empty folder, and no server to reach."""
    home = tmp_path / "home"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("HF_", "TORCH_HOME", "XDG_", "NEON_")):
            monkeypatch.delenv(name)
    environment = {"HOME": home, "no_proxy": "*", "NEON_MIRROR": NOWHERE, "HF_ENDPOINT": NOWHERE}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(home)
    return home


def download(*flags: str, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "neon.cli", "download", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


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
    assert files(home) == set()


def test_one_architecture_is_fetched_whole_and_a_second_run_skips_it(home: Path, server: str, hub: str) -> None:
    done = download("--only", "edm")
    assert "failed: 1" in done.stdout  # Inception: its hash cannot be forged
    names = ["Neon_EDM_FFHQ.pkl", "Neon_EDM_conditional_CIFAR10.pkl", "Neon_EDM_unconditional_CIFAR10.pkl"]
    references = {str(Path(table()[name]["places"][0]).relative_to(home)) for name in REFERENCES}
    assert files(home) == {f"checkpoints/{name}" for name in names} | references
    assert sorted(Hub.asked) == [f"sinaalemohammad/Neon {name}" for name in names]
    again = download("--only", "edm")
    assert "present: 5, fetched: 0, failed: 1" in again.stdout
    assert len(Hub.asked) == 3


def test_files_without_a_known_address_say_who_publishes_them_and_come_from_a_mirror(
    home: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.refusal = "EntryNotFound"
    mirrored = "imagenet256_ts_a2.pkl  http://mirror/folder/imagenet256_ts_a2.pkl"
    monkeypatch.setenv("NEON_MIRROR", "http://mirror/folder/")
    assert mirrored in download("--dry-run", "--base").stdout
    monkeypatch.setenv("NEON_MIRROR", "")
    monkeypatch.setenv("https_proxy", NOWHERE)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the internet is out of reach, the Hub is not
    done = download("--only", "imm", "--base")
    assert done.returncode == 1
    assert "imagenet256_ts_a2.pkl: published by IMM, but no address of it is known; save it as" in done.stderr


def test_an_interrupted_transfer_goes_on_where_it_was(home: Path, server: str) -> None:
    path, half = only("cifar10-32x32.npz", home), len(STATISTICS) // 2
    Handler.trouble = "breaks"
    done = download("--only", "edm")
    assert done.returncode == 1 and not path.exists()
    assert f"cifar10-32x32.npz: broken off after {half} of {len(STATISTICS)} bytes" in done.stderr
    assert path.with_name(f"{path.name}.part").read_bytes() == STATISTICS[:half]
    Handler.trouble = ""
    Handler.asked.clear()
    download("--only", "edm")
    assert Handler.asked[0] == ("/cifar10-32x32.npz", f"bytes={half}-")
    assert path.read_bytes() == STATISTICS and list(path.parent.iterdir()) == [path]


def test_a_killed_transfer_goes_on_where_it_was(home: Path, server: str) -> None:
    path, half = only("cifar10-32x32.npz", home), len(STATISTICS) // 2
    part = path.with_name(f"{path.name}.part")
    Handler.trouble = "hangs"
    with subprocess.Popen([sys.executable, "-m", "neon.cli", "download", "--only", "edm"]) as running:
        while not (part.exists() and part.stat().st_size == half):
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
    Handler.trouble = ""
    Handler.asked.clear()
    download("--only", "edm")
    assert Handler.asked[0] == ("/cifar10-32x32.npz", f"bytes={half}-")
    assert path.read_bytes() == STATISTICS and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("trouble", "kept"), [("no ranges", 1000), ("", len(STATISTICS))])
def test_a_transfer_that_the_server_cannot_continue_starts_anew(
    home: Path, server: str, trouble: str, kept: int
) -> None:
    path = only("ffhq-64x64.npz", home)
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.part").write_bytes(bytes(kept))
    path.with_name(f"{path.name}.part.origin").write_text(f"{server}/ffhq-64x64.npz\n{VERSION}")
    Handler.trouble = trouble
    download("--only", "edm")
    assert path.read_bytes() == STATISTICS


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("missing", "the server answers 404 (Not Found); check the address"),
        ("page", "an HTML page in its place (a login page?)"),
    ],
)
def test_what_a_server_answers_instead_of_a_file_is_said_and_not_kept(
    home: Path, server: str, trouble: str, message: str
) -> None:
    path = only("cifar10-32x32.npz", home)
    Handler.trouble = trouble
    done = download("--only", "edm")
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "cifar10" in line]
    assert line == f"failed   {path}: {server}/cifar10-32x32.npz: {message}"
    assert f"  {line.removeprefix('failed   ')}\n" in done.stdout  # the summary
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_is_said_and_what_came_is_kept(home: Path, server: str) -> None:
    path = only("cifar10-32x32.npz", home)
    done = download("--only", "edm", largest_file=1_000_000)
    assert done.returncode == 1
    assert f"{path}.part: writing failed (File too large, " in done.stderr
    assert path.with_name(f"{path.name}.part").stat().st_size == 1_000_000


def test_a_full_disk_is_said_of_what_comes_from_hugging_face_too(home: Path, server: str, hub: str) -> None:
    done = download("--only", "VAR", largest_file=1_000_000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "failed   fid_stats/adm_in512_stats.npz: " in done.stderr
    assert "adm_in512_stats.npz.part: writing failed (File too large, " in done.stderr
    assert not Path("fid_stats/adm_in512_stats.npz.part").exists()


def test_too_small_a_disk_is_said_before_anything_is_fetched(
    home: Path, server: str, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = shutil.disk_usage(home)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    assert main(["download", "--only", "edm"]) == 1
    path = table()["cifar10-32x32.npz"]["places"][0]
    assert f"{path}: the disk is full: about 34 MB to come, 2 MB free" in capsys.readouterr().err
    assert Handler.asked == [] and Hub.asked == []


def test_no_network_is_said_and_a_server_is_not_asked_twice(home: Path, hub: str) -> None:
    Hub.refusal = "EntryNotFound"
    done = download("--only", "edm")
    lines = [line for line in done.stderr.splitlines() if line.startswith("failed") and "checkpoints/Neon" not in line]
    assert len(lines) == 3  # two statistics, Inception
    assert "no connection (" in lines[0] and "check the network and run again" in lines[0]
    assert all(line.endswith(f"no connection to {NOWHERE}/, as before") for line in lines[1:])


def test_hugging_face_is_not_asked_again_without_a_connection(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # huggingface_hub tries a server that refuses for 23 s
    done = download("--only", "imm")
    lines = [line for line in done.stderr.splitlines() if "no connection to Hugging Face" in line]
    assert len(lines) == 4 and "check the network and run again" in lines[0]
    assert all(line.endswith(f"no connection to Hugging Face {NOWHERE}, as before") for line in lines[1:])
    assert files(home) == set()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ("EntryNotFound", "not in the repository sinaalemohammad/Neon"),
        ("RepoNotFound", "no such repository, or not for you; if it asks for a login: `hf auth login`"),
        ("GatedRepo", "gated; ask for access on its page and log in (`hf auth login`, or HF_TOKEN)"),
        ("Closed", "Hugging Face refuses ("),
    ],
)
def test_a_refusal_of_hugging_face_is_told_in_one_line(home: Path, hub: str, refusal: str, message: str) -> None:
    Hub.refusal = refusal
    done = download("--only", "imm")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("failed") and "Neon_imm" in line]
    assert line.startswith("failed   checkpoints/Neon_imm_imagenet256.pkl: ") and message in line
    assert files(home) == set()


def test_a_page_from_hugging_face_is_not_kept(home: Path, hub: str) -> None:
    Hub.page = True
    done = download("--only", "imm")
    assert "sinaalemohammad/Neon: an HTML page in its place" in done.stderr
    assert files(home) == set()


def test_pieces_of_a_killed_download_from_hugging_face_are_removed(home: Path, server: str, hub: str) -> None:
    piece = Path("fid_stats/adm_in512_stats.npz.part/.cache/huggingface/download/a.1234.incomplete")
    piece.parent.mkdir(parents=True)
    piece.touch()
    download("--only", "VAR")
    assert Path("fid_stats/adm_in512_stats.npz").read_bytes() == STATISTICS
    assert not Path("fid_stats/adm_in512_stats.npz.part").exists()


@pytest.mark.parametrize("place", ["beside", "path"])
def test_the_script_passes_its_flags_to_neon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    script = tmp_path / "checkout" / "download_models.sh"
    folder = script.parent / ".venv/bin" if place == "beside" else tmp_path / "bin"
    folder.mkdir(parents=True)
    script.parent.mkdir(exist_ok=True)
    shutil.copy(SCRIPT, script)
    (folder / "neon").write_text('#!/bin/sh\necho "$0 $@"; exit 3\n')
    (folder / "neon").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    done = subprocess.run(["bash", str(script), "--only", "edm"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{folder}/neon download --only edm\n", "")


def test_without_neon_the_script_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = shutil.copy(SCRIPT, tmp_path)
    bash, dirname = shutil.which("bash"), shutil.which("dirname")
    assert bash and dirname
    (tmp_path / "dirname").symlink_to(dirname)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run([bash, script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "download_models.sh: neon is not installed; run `pip install -e .` in the checkout\n"


def test_commands_that_only_tell_of_themselves_wait_for_no_library() -> None:
    program = """
import sys, neon.cli.download, neon.cli.doctor
print({"torch", "numpy", "tqdm", "huggingface_hub"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


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
    assert flags[-1] in done.stderr and "Traceback" not in done.stderr
    assert files(home) == set()


def test_help_shows_every_flag() -> None:
    done = download("--help")
    assert done.returncode == 0
    for flag in ("--only", "--base", "--dry-run", "--list", "HF_ENDPOINT", "NEON_MIRROR"):
        assert flag in done.stdout.replace("--dry_run", "--dry-run")
