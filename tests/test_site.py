"""The pages of docs/: all are on the site, their links hold, and the commands of the tutorial work.

The site itself is built where mkdocs is installed (`make docs`).
"""

import re
from pathlib import Path

import pytest
import yaml

from neon.checkpoint import load_state
from tests.programs import ROOT
from tests.test_help import parses
from tests.test_own_model import run
from tests.test_readme import blocks, fewer

MADE = {"index.md", "changelog.md", "contributing.md", "commands.md", "programs.md", "python.md"}
COMMANDS = [line for block in blocks("sh", "docs/tutorial.md") for line in block.splitlines()]
FEW = {
    "--num_images 1000": "--num_images 20",
    "--num_images 2000": "--num_images 66",
    "--num_images 16": "--num_images 4",
    "--total_images 6400 --batch 128 --batch_gpu 32": "--total_images 64 --batch 32 --batch_gpu 32",
    "snapshot-000006.400-kimg": "snapshot-000000.064-kimg",
    "-w -1 0 0.5 1 1.5": "-w 0 1",
}


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose one function is not called here."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages(nav: list) -> set[str]:
    """The names of files in a part of the navigation."""
    values = [value for entry in nav for value in entry.values()]
    return set().union(*(pages(value) if isinstance(value, list) else {value} for value in values))


def test_every_document_is_in_the_navigation() -> None:
    named = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    assert named - MADE == {path.name for path in (ROOT / "docs").glob("*.md")}


def anchors(document: Path) -> set[str]:
    """The places within a document that a link can name, as hosts of repositories call them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_link_to_a_section_leads_there(document: Path) -> None:
    for name, anchor in re.findall(r"\]\(([\w./]*\.md)?#([^)]+)\)", document.read_text()):
        assert anchor in anchors(document.parent / name if name else document), f"{name}#{anchor}"


def test_the_commands_of_the_tutorial_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer images; the long ones are parsed as they stand there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neon").symlink_to(ROOT / "neon")
    for command in COMMANDS:
        parses(command)
    for command in fewer("\n".join(COMMANDS), FEW).splitlines():
        if "runs/tutorial/improve" not in command:
            assert run(command) == 0, command
    runs = tmp_path / "runs" / "tutorial"
    assert len(load_state(runs / "neon.safetensors")) == len(load_state("neon/demo/base.safetensors"))
    first, second = ((runs / name / "00000003.png").read_bytes() for name in ("base", "neon"))
    assert first != second


def test_the_site_is_built_without_a_warning_and_asks_for_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("material", reason="needs Python 3.11 and the extra docs")
    build = pytest.importorskip("mkdocs.commands.build", reason="needs Python 3.11 and the extra docs")
    config = pytest.importorskip("mkdocs.config")
    monkeypatch.chdir(ROOT)
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))  # Abort if it warns
    for page in [*tmp_path.glob("*.html"), *tmp_path.rglob("*.css")]:
        text = page.read_text()
        assert not re.search(r"""(?:\bsrc="|<link[^>]* href="|url\(["']?|@import ["'])(?:https?:)?//""", text), page
    commands = (tmp_path / "commands.html").read_text()
    assert 'id="neon-merge"' in commands and "(default: None)" not in commands
    assert '<span class="flag">--self_trained</span> FILE</code></dt>' in commands
    assert '<a href="improve.html#by-lora">Improve a model: By LoRA</a>' in (tmp_path / "index.html").read_text()
    assert "training_loss" in (tmp_path / "python.html").read_text()
    assert not re.search(r"<pre[^>]*>((?!</pre>).)*<wbr>", (tmp_path / "tutorial.html").read_text(), re.S)
