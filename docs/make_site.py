"""What the documentation site has beside docs/*.md: the repository's own pages, the help of every command, one more
page of Python, and the files that pages link to. mkdocs calls the functions `on_...` (`make docs`).

A link is written as it holds in the repository; here it gets to hold on the site, too.
"""

import contextlib
import html
import io
import os
import posixpath
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from neon.cli import app

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""pages of the repository, and what they are called on the site"""
LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|srcset|href)=")(?P<path>[^)#:"\s]+)(?P<rest>#[^)"]*)?(?=[)"])""")
FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*|\b\d+e-\d+")
"""a flag, or a number such as 1e-4"""
PROGRAMS = ("edm", "VAR", "xAR", "imm")
FLAGS = (
    "Hyphens and underscores in flags are the same: `--num-images` is `--num_images`. Where no default is named, "
    "a flag is off, or its text says what is done without it."
)
WIDTH = "1000"
"""columns of a terminal in which no help of a flag is wrapped"""
PYTHON = """# Python, for models of your own

The class that a [model of your own](own_model.md) subclasses, the recipe that it is trained by, and merges that are not
of files. What `import neon` has is on [its own page](api.md).

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
    """The text of a page with links that hold on the site; of a link to a folder the text is left.

    A link that is written as the name of a file says what the page is called here.
    """
    folder = posixpath.dirname(page.file.src_uri)
    for link, target in links(markdown, page.file.src_uri):
        if target.is_dir():
            markdown = re.sub(rf"\[([^]]*){re.escape(link[0])}\)", r"\1", markdown)
        else:
            new = f"{link['before']}{posixpath.relpath(place(target), folder or '.')}{link['rest'] or ''}"
            markdown = re.sub(rf"{re.escape(link[0])}(?=[)\"])", new, markdown)
    titles = dict(named(config.nav or []))

    def called(link: re.Match[str]) -> str:
        name, anchor = link["page"], link["anchor"]
        file = files.get_file_from_path(name)
        section = {slug(title): title for title in re.findall(r"^#+ (.*)$", file.content_string if file else "", re.M)}
        title = titles.get(name, name) + (f": {section[anchor]}" if anchor in section else "")
        return f"[{title}]({name}{'#' + anchor if anchor else ''})"

    markdown = re.sub(r"\[[\w./]+\.md\]\((?P<page>[\w.]+\.md)(?:#(?P<anchor>[^)]+))?\)", called, markdown)
    markdown = re.sub(r"(\]\([^)]+\.ipynb\))", r"\1{ download }", markdown)  # a browser would show its JSON
    return markdown.replace("<details>", '<details markdown="1">')  # a Markdown of hosts needs no word of it


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with flags and figures that no line break cuts, and pictures that a click shows by themselves.

    A browser may break a line after every hyphen and space, and in a path in the middle of a word.
    """

    def kept(code: re.Match[str]) -> str:
        parts = re.split(r"(<[^>]*>)", code[0])
        parts[::2] = [FLAG.sub(r'<span class="flag">\g<0></span>', text) for text in parts[::2]]
        if code[0].startswith("<code"):  # within a line of text, not a block
            parts[::2] = [re.sub(r"(?<=\w)[/:](?=\w)", r"\g<0><wbr>", text) for text in parts[::2]]
        return "".join(parts)

    content = re.sub(r'<img [^>]*?src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', content)
    content = re.sub(r"<pre[ >].*?</pre>|<code[ >].*?</code>", kept, content, flags=re.S)
    return re.sub(
        r"(?<=\d) ± (?=\d)|(?<=\bw) = (?=-?\d)", lambda sign: sign[0].replace(" ", "\N{NO-BREAK SPACE}"), content
    )


def named(nav: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each page of the navigation, with its title there."""
    for entry in nav:
        for title, value in entry.items():
            yield from named(value) if isinstance(value, list) else [(value, title)]


def slug(title: str) -> str:
    """What a link calls a section, as hosts of repositories do."""
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


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
    helps = {name: printed(partial(app.main, [name, "--help"])) for name in app.COMMANDS}
    parts = [
        f"# Commands\n\nEvery command with all of its flags, as `neon COMMAND --help` has them. {FLAGS}\n",
        "| command | what it does |\n|---|---|",
        *(f"| [`neon {name}`](#neon-{name}) | {paragraphs(text)[1]} |" for name, text in helps.items()),
    ]
    return "\n".join([*parts, *(f"\n## neon {name}\n\n{readable(text)}" for name, text in helps.items())])


def programs() -> str:
    """The page of the programs that take the published flags."""
    parts = [
        "# Programs with the published flags\n\nFor whoever has command lines of the published repositories of EDM, "
        "VAR, xAR or IMM, and wants to go on using them; everybody else has the [commands](commands.md) of `neon`. Run "
        f"from the checkout: `python edm/sample.py ...`. {FLAGS}\n"
    ]
    files = [file for folder in PROGRAMS for file in sorted((ROOT / folder).glob("*.py"))]
    for file in files:
        if "run_program(" in file.read_text():
            name = file.relative_to(ROOT).as_posix()
            with mock.patch.object(sys, "argv", [name, "--help"]):
                text = printed(partial(runpy.run_path, str(file), run_name="__main__"))
            parts.append(f"## {name}\n\n{readable(text)}")
    return "\n".join(parts)


def printed(run: Callable[[], object]) -> str:
    """What a program prints."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS=WIDTH), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run()
    return out.getvalue().strip()


def paragraphs(text: str) -> list[str]:
    """What stands above the flags in a help, as HTML: the usage, what the program does, an example."""
    above = re.split(r"^ \S[^\n]*\n -+ *$", text, maxsplit=1, flags=re.M)[0]
    return [prose(part) for part in above.strip().split("\n\n")]


def readable(text: str) -> str:
    """A help as HTML that fits a telephone: its paragraphs, and its flags as a list of definitions."""
    usage, *rest = paragraphs(text)
    lines = [f'<div class="language-sh highlight"><pre><code>{usage.removeprefix("usage: ")}</code></pre></div>']
    for part in rest:
        example = part.removeprefix("Example: ")
        lines.append(f"<p>{part}</p>" if example == part else f"<p>Example: <code>{example}</code></p>")
    flags: list[tuple[str, str]] = []
    for line in text.splitlines():
        if flag := re.match(r"  (\S.*?)(?:\s{2,}(.*))?$", line):
            flags.append((flag[1].replace("{None}|", ""), flag[2] or ""))
        elif line.startswith("   ") and flags:
            flags[-1] = (flags[-1][0], f"{flags[-1][1]} {line}")
    lines.append("<dl>")
    for names, what in flags:
        what = re.sub(r" \(default: (?:None|False)?\s*\)", "", what)
        lines.append(f"<dt><code>{html.escape(names)}</code></dt><dd>{prose(what)}</dd>")
    return "\n".join([*lines, "</dl>"]) + "\n"


def prose(text: str) -> str:
    """A paragraph of plain text as HTML, with `code`."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(" ".join(text.split()), quote=False))
