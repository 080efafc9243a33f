"""`--help` of every program fits a screen and shows a command that works; a mistyped flag is one line of advice."""

import functools
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tyro

import edm.calculate_fid
import edm.finetune
import edm.flags
import edm.sample
import imm.calculate_fid
import imm.encode
import imm.finetune
import imm.flags
import imm.sample
import VAR.calculate_fid
import VAR.encode
import VAR.finetune
import VAR.flags
import VAR.sample
import VAR.train_tokenizer
import xAR.calculate_fid
import xAR.encode
import xAR.finetune
import xAR.flags
import xAR.sample
from neon.cli import app as cli
from neon.cli import programs
from neon.cli.command_line import parse, run_program
from neon.cli.usage import Flag, flags_of

ROOT = Path(__file__).parent.parent
NEON = [f"neon {name}" for name in (*cli.COMMANDS, *cli.PROGRAMS)]
FILES: dict[str, tuple[type, Mapping[str, str]]] = {
    "edm/sample.py": (edm.sample.Sample, edm.flags.ALIASES | edm.sample.ABLATION_ALIASES),
    "edm/finetune.py": (edm.finetune.Finetune, edm.finetune.ALIASES),
    "edm/calculate_fid.py": (edm.calculate_fid.CalculateFID, edm.flags.ALIASES),
    "VAR/sample.py": (VAR.sample.Sample, VAR.flags.ALIASES),
    "VAR/finetune.py": (VAR.finetune.Finetune, VAR.flags.ALIASES),
    "VAR/calculate_fid.py": (VAR.calculate_fid.CalculateFID, VAR.flags.ALIASES),
    "VAR/encode.py": (VAR.encode.Encode, {}),
    "VAR/train_tokenizer.py": (VAR.train_tokenizer.TrainTokenizer, {}),
    "xAR/sample.py": (xAR.sample.Sample, xAR.flags.ALIASES),
    "xAR/finetune.py": (xAR.finetune.Finetune, xAR.flags.ALIASES),
    "xAR/calculate_fid.py": (xAR.calculate_fid.CalculateFID, xAR.flags.ALIASES),
    "xAR/encode.py": (xAR.encode.Encode, {}),
    "imm/sample.py": (imm.sample.Sample, imm.flags.ALIASES),
    "imm/finetune.py": (imm.finetune.Finetune, imm.flags.ALIASES),
    "imm/calculate_fid.py": (imm.calculate_fid.CalculateFID, imm.flags.ALIASES),
    "imm/encode.py": (imm.encode.Encode, {}),
}
EVERY = pytest.mark.parametrize("name", [*NEON, *FILES])


def program(name: str) -> tuple[Callable[..., Any], Mapping[str, str]]:
    """What a program is parsed by, and other spellings of its flags."""
    if name in FILES:
        return FILES[name]
    command = name.removeprefix("neon ")
    return cli.COMMANDS.get(command) or getattr(programs, command.capitalize()), {}


def flags(name: str) -> list[Flag]:
    called, aliases = program(name)
    return flags_of(called, underscores=isinstance(called, type), aliases=aliases)


def run(name: str, *words: str) -> int:
    """The exit code of a program."""
    if name in FILES:
        return run_program(*FILES[name], words, name=name)
    return cli.main([*name.split()[1:], *words])


def parses(command: str) -> None:
    """Assert that one of the programs takes the flags of a command; nothing is run."""
    words = shlex.split(command, comments=True)
    if "neon_merge.py" in words:
        words[words.index("neon_merge.py")] = "merge"
        words.insert(words.index("merge"), "neon")
    if "neon.cli" in words:
        words[words.index("neon.cli")] = "neon"
    files = [word for word in words if word in FILES]
    at = words.index(files[0] if files else "neon")
    name, rest = (words[at], words[at + 1 :]) if files else (f"neon {words[at + 1]}", words[at + 2 :])
    called, aliases = program(name)
    if not isinstance(called, type):
        called = functools.wraps(called)(lambda *args, **kwargs: None)
    parse(called, rest, name=name, aliases=aliases)


@EVERY
def test_help_fits_a_screen_and_its_example_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    first = next(index for index, line in enumerate(lines) if line.startswith("Example: "))
    last = next(index for index in range(first, len(lines)) if not lines[index].endswith("\\"))
    example = "\n".join(lines[first : last + 1]).replace("\\\n", " ").removeprefix("Example: ")
    assert name in example
    parses(example)


@EVERY
def test_help_names_the_flags_that_are_parsed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read from the signature here, and once more by tyro."""
    called, _ = program(name)
    with pytest.raises(SystemExit):  # a box around its help depends on the terminal
        config = (tyro.conf.FlagCreatePairsOff,)
        tyro.cli(called, args=["--help"], config=config, use_underscores=isinstance(called, type))
    theirs = set(re.findall(r"^[│ ] (?:-\w .*, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {flag.names[-1] for flag in flags(name) if flag.names} == theirs - {"--help"}


@EVERY
def test_every_flag_says_what_it_means(name: str) -> None:
    assert [flag.names for flag in flags(name) if not flag.text] == []


@EVERY
def test_an_unknown_flag_is_one_line_that_names_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = max((flag.names[-1] for flag in flags(name) if flag.names), key=len, default=None)
    mistyped = "--out" if known is None else known[:-3] + known[-2:]
    assert run(name, mistyped, "1") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{mistyped}: unknown flag; {'see --help' if known is None else f'did you mean {known}?'}" in line


def test_a_flag_that_resembles_none_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edm/sample.py", "--zzz=3") == 2
    assert capsys.readouterr().err == "edm/sample.py: --zzz: unknown flag; see --help\n"


def test_flags_that_are_missing_are_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edm/finetune.py", "--data", "images.zip") == 2
    assert capsys.readouterr().err == "edm/finetune.py: --outdir: missing; see --help\n"


def test_dashes_and_underscores_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("--self-trained", "--self_trained"):
        assert run("neon merge", "--base", "none.pth", spelling, "none.pth", "-w", "-1", "--output", "out.pth") == 2
        assert "none.pth: no such file" in capsys.readouterr().err
    for ref in ("--ref", "--fid_stats", "--fid-stats"):
        parses(f"VAR/calculate_fid.py --var_ckpt var.pth --N 10 {ref} real.npz")


def test_a_mistyped_command_is_one_line_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftrian"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "did you mean selftrain?" in line


def test_help_of_neon_names_every_command_and_a_program_of_each_architecture(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for name in NEON:
        assert re.search(rf"^  {name.removeprefix('neon ')} ", printed, re.MULTILINE), name
    for folder in ("edm/", "VAR/", "xAR/", "imm/"):
        assert folder in printed
    [example] = re.findall("^Example: (.*)$", printed, re.MULTILINE)
    parses(example)


def test_every_command_of_the_documents_parses() -> None:
    ours = re.compile(r"(?:/(?:sample|finetune|calculate_fid|encode|train_tokenizer)|neon_merge)\.py |^neon ")
    found = 0
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"VAR/VAR_imagenet_\d+/calculate", "VAR/calculate", line)
                if ours.search(line):
                    parses(line)
                    found += 1
    assert found > 30
