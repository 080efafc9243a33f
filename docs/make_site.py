"""What the documentation site has beside docs/*.md: the repository's own pages, the help of every command, one more
page of Python, and the files that pages link to. mkdocs calls the functions `on_...` (`make docs`).

A link is written as it holds in the repository; here it gets to hold on the site, too.
"""

import contextlib
import io
import os
import posixpath
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from neon.cli import app

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""pages of the repository, and what they are called on the site"""
LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|srcset|href)=")(?P<path>[^)#:"\s]+)(?P<rest>#[^)"]*)?(?=[)"])""")
PROGRAMS = ("edm", "VAR", "xAR", "imm")
WIDTH = "80"
PYTHON = """# Python, one level below

What `import neon` has is on [its own page](api.md). These are for a [model of your own](own_model.md), and for merges
that are not of files.

::: neon.model.GenerativeModel

::: neon.recipe.Recipe

::: neon.merge.LiveMerge

::: neon.merge.merge_state
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, and those that are made or lie elsewhere."""
    made = {PAGES[name]: (ROOT / name).read_text() for name in PAGES}
    made |= {"commands.md": commands(), "programs.md": programs(), "python.md": PYTHON}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for file in list(files.documentation_pages()):
        for target in {target for _, target in links(file.content_string, file.src_uri)}:
            name = place(target)
            if target.is_file() and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page with links that hold on the site; of a link to a folder the text is left."""
    folder = posixpath.dirname(page.file.src_uri)
    for link, target in links(markdown, page.file.src_uri):
        if target.is_dir():
            markdown = re.sub(rf"\[([^]]*){re.escape(link[0])}\)", r"\1", markdown)
        else:
            new = f"{link['before']}{posixpath.relpath(place(target), folder or '.')}{link['rest'] or ''}"
            markdown = re.sub(rf"{re.escape(link[0])}(?=[)\"])", new, markdown)
    return markdown.replace("<details>", '<details markdown="1">')  # a Markdown of hosts needs no word of it


def links(markdown: str, page: str) -> Iterator[tuple[re.Match[str], Path]]:
    """Each link of a page to a file or folder of the repository, once, with what it leads to."""
    original = {new: old for old, new in PAGES.items()}.get(page, f"docs/{page}")
    for link in {match[0]: match for match in LINK.finditer(markdown)}.values():
        target = Path(os.path.normpath(ROOT / posixpath.dirname(original) / link["path"]))
        if target.exists() and target.is_relative_to(ROOT):
            yield link, target


def place(target: Path) -> str:
    """Where a file of the repository lies on the site."""
    name = target.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"source/{name}")


def commands() -> str:
    """The page of all `neon` commands."""
    parts = ["# Commands\n\nWhat `neon COMMAND --help` prints, of every command. `--num-images` is `--num_images`.\n"]
    for name in app.COMMANDS:
        parts.append(f"## neon {name}\n\n{printed(partial(app.main, [name, '--help']))}")
    return "\n".join(parts)


def programs() -> str:
    """The page of the programs that take the published flags."""
    parts = ["# Programs with the published flags\n\nWhat each prints with `--help`.\n"]
    files = [file for folder in PROGRAMS for file in sorted((ROOT / folder).glob("*.py"))]
    for file in files:
        if "run_program(" in file.read_text():
            name = file.relative_to(ROOT).as_posix()
            with mock.patch.object(sys, "argv", [name, "--help"]):
                text = printed(partial(runpy.run_path, str(file), run_name="__main__"))
            parts.append(f"## {name}\n\n{text}")
    return "\n".join(parts)


def printed(run: Callable[[], object]) -> str:
    """What a program prints, as a block of text."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=WIDTH), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run()
    return f"```text\n{out.getvalue().strip()}\n```\n"
