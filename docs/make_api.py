"""Write docs/api.md from the signatures and docstrings of what `import neon` has.

python docs/make_api.py
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import neon

PAGE = Path(__file__).with_name("api.md")
ORDER = (
    "load", "Generator", "improve_model", "Improved", "sample_set", "self_train", "extrapolate", "score", "Scores",
    "RequestError", "WorkError",
)  # fmt: skip
"""as one meets them; names that are not here follow"""
INTRODUCTION = """# Neon from Python

For whoever uses Neon from a program or a notebook. An example that runs: [by hand](by_hand.md#from-python). The page is
made from the docstrings by `python docs/make_api.py`.

{}

A `PathLike` is a path as text or a `pathlib.Path`. One level below, `neon.merge.LiveMerge` puts one w after another
into a live network in place, and `neon.model.GenerativeModel` is what a [model of your own](own_model.md) subclasses.
"""


def page() -> str:
    """The text of docs/api.md."""
    names = sorted(set(neon.__all__) - {"__version__"}, key=lambda name: (*ORDER, name).index(name))
    library = inspect.getdoc(inspect.getmodule(neon.load))
    parts = [INTRODUCTION.format((library or "").partition("\n\n")[2])]
    for name in names:
        node = definition(name)
        parts.append("".join(of_class(node) if isinstance(node, ast.ClassDef) else of_function(node, "neon.", "##")))
    return "\n".join(parts)


def definition(name: str) -> ast.ClassDef | ast.FunctionDef:
    """Where the source defines a public name."""
    source = Path(inspect.getfile(inspect.unwrap(getattr(neon, name)))).read_text()
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
    assert isinstance(found[-1], ast.ClassDef | ast.FunctionDef)
    return found[-1]


def of_function(node: ast.FunctionDef, prefix: str, level: str) -> Iterator[str]:
    yield f"{level} `{prefix}{node.name}`\n\n```python\n{signature(node)}\n```\n\n"
    yield prose(ast.get_docstring(node) or "")


def of_class(node: ast.ClassDef) -> Iterator[str]:
    yield f"## `neon.{node.name}`\n\n{prose(ast.get_docstring(node) or '')}"
    fields = []
    for one, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(one, ast.AnnAssign):
            continue
        said = after.value if isinstance(after, ast.Expr) else None
        text = f": {' '.join(str(said.value).split())}" if isinstance(said, ast.Constant) else ""
        default = f" = {ast.unparse(one.value)}" if isinstance(one.value, ast.Constant) else ""
        fields.append(f"- `{ast.unparse(one.target)}: {ast.unparse(one.annotation)}{default}`{text}\n")
    yield from ["\n", *fields] if fields else []
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
            yield "\n"
            yield from of_function(one, f"{node.name}.", "###")


def signature(node: ast.FunctionDef) -> str:
    """`name(arguments) -> result`, on one line where it fits in, else with a line for each argument."""
    parameters = node.args
    named = [*parameters.posonlyargs, *parameters.args]
    defaults = [None] * (len(named) - len(parameters.defaults)) + list(parameters.defaults)
    words = [word(one, default) for one, default in zip(named, defaults, strict=True) if one.arg != "self"]
    words += ["*"] if parameters.kwonlyargs else []
    words += [word(one, default) for one, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)]
    words += [f"**{word(parameters.kwarg, None)}"] if parameters.kwarg else []
    result = f" -> {ast.unparse(node.returns).strip(chr(39))}" if node.returns else ""
    line = f"{node.name}({', '.join(words)}){result}"
    if len(line) <= 100:
        return line
    return f"{node.name}(\n{textwrap.indent(''.join(f'{one},{chr(10)}' for one in words), '    ')}){result}"


def word(parameter: ast.arg, default: ast.expr | None) -> str:
    annotated = f"{parameter.arg}: {ast.unparse(parameter.annotation)}" if parameter.annotation else parameter.arg
    return annotated if default is None else f"{annotated} = {ast.unparse(default)}"


def prose(docstring: str) -> str:
    """A docstring as Markdown: paragraphs as they are, the entries of Args and Raises as lists."""
    text, *sections = re.split(r"^(Args|Returns|Raises):\n", docstring, flags=re.MULTILINE)
    parts = [text.strip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries = re.split(r"\n(?=\S)", textwrap.dedent(body).strip())
        lines = [" ".join(entry.split()) for entry in entries]
        if title != "Returns":
            lines = [f"- `{name}`:{rest}" for name, _, rest in (line.partition(":") for line in lines)]
        parts.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
