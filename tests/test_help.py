"""`--help` of every program answers at once and shows a command that works; a mistyped flag gets advice."""

import dataclasses
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

from neon import __version__
from neon.cli import app, command_line
from neon.cli.command_line import run_program

ROOT = Path(__file__).parent.parent
NEON = [f"neon {name}" for name in app.COMMANDS]
FILES = {
    "edm/sample.py": "SampleEDM",
    "edm/finetune.py": "TrainEDM",
    "edm/calculate_fid.py": "ScoreEDM",
    "VAR/sample.py": "SampleVAR",
    "VAR/finetune.py": "TrainVAR",
    "VAR/calculate_fid.py": "ScoreVAR",
    "VAR/encode.py": "EncodeForVAR",
    "VAR/train_tokenizer.py": "TrainTokenizer",
    "xAR/sample.py": "SampleXAR",
    "xAR/finetune.py": "TrainXAR",
    "xAR/calculate_fid.py": "ScoreXAR",
    "xAR/encode.py": "EncodeForXAR",
    "imm/sample.py": "SampleIMM",
    "imm/finetune.py": "TrainIMM",
    "imm/calculate_fid.py": "ScoreIMM",
    "imm/encode.py": "EncodeForIMM",
}
EVERY = pytest.mark.parametrize("name", [*NEON, *FILES])


def program(name: str) -> type:
    """The class that a program is."""
    if name in FILES:
        return getattr(import_module(name.removesuffix(".py").replace("/", ".")), FILES[name])
    return app.command(name.removeprefix("neon "))


def run(name: str, *words: str) -> int:
    """The exit code of a program."""
    return run_program(program(name), words, name=name)


def parses(command: str) -> object:
    """The program that a command line describes; nothing is run."""
    words = shlex.split(command, comments=True)
    if "neon_merge.py" in words:
        words[words.index("neon_merge.py")] = "merge"
        words.insert(words.index("merge"), "neon")
    if "neon.cli" in words:
        words[words.index("neon.cli")] = "neon"
    files = [word for word in words if word in FILES]
    at = words.index(files[0] if files else "neon")
    name, rest = (words[at], words[at + 1 :]) if files else (f"neon {words[at + 1]}", words[at + 2 :])
    return command_line.parse(program(name), rest, name)


@EVERY
def test_the_example_of_a_program_parses(name: str) -> None:
    text = " ".join((program(name).__doc__ or "").split())
    example = re.search(r"Example: (.*)$", text)
    assert example, "the docstring ends with one"
    assert name in example[1]
    parses(example[1])


@EVERY
def test_every_flag_says_what_it_means(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    printed = capsys.readouterr().out
    assert "Example: " in printed
    entries: list[str] = []
    for line in printed.splitlines():
        inner = line.strip("│ ")
        if re.match(r"[│ ]{2,3}-", line) and set(inner) != {"-"}:
            entries.append(inner)
        elif entries:
            entries[-1] += inner
    assert entries
    for entry in entries:
        assert re.sub(r"--?[\w-]+|\{[^}]*\}|\([^)]*\)|[A-Z|.\[\]{}_,: ]+", "", entry), entry


def test_help_does_not_wait_for_torch() -> None:
    """No program imports torch, numpy or scipy before its work begins."""
    lines = [f"from {n.removesuffix('.py').replace('/', '.')} import {cls}" for n, cls in FILES.items()]
    code = "\n".join(
        [
            "import sys",
            "from neon.cli import app",
            *lines,
            "[app.command(name) for name in app.COMMANDS]",
            "heavy = {'torch', 'numpy', 'scipy', 'timm', 'matplotlib', 'huggingface_hub'} & sys.modules.keys()",
            "sys.exit(', '.join(heavy) or 0)",
        ]
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (0, "")


@EVERY
def test_an_unknown_flag_is_refused_with_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [field.name for field in dataclasses.fields(program(name)) if len(field.name) > 5]
    known = "--" + max(flags, key=len, default="help").replace("_", "-")
    assert run(name, known[:-3] + known[-2:], "1") == 2
    shown = capsys.readouterr().err.replace("_", "-")
    assert "Unrecognized options" in shown or "Missing" in shown or "equired" in shown


def test_a_mistyped_flag_gets_the_nearest_as_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edm/sample.py", "--network_pkl", "a", "--outdir", "b", "--num_stepss", "3") == 2
    assert "--num_steps" in capsys.readouterr().err


def test_flags_that_are_missing_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edm/finetune.py", "--data", "images.zip") == 2
    assert "--outdir" in capsys.readouterr().err


def test_only_the_first_process_says_what_is_wrong_with_the_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("edm/sample.py", "--num_steps", "many") == 2
    assert capsys.readouterr() == ("", "")


def test_dashes_and_underscores_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("--self-trained", "--self_trained"):
        assert run("neon merge", "--base", "none.pth", spelling, "none.pth", "-w", "-1", "--output", "out.pth") == 2
        assert "none.pth: no such file" in capsys.readouterr().err
    for ref in ("--ref", "--fid_stats", "--fid-stats"):
        command = parses(f"VAR/calculate_fid.py --var_ckpt var.pth --N 10 {ref} real.npz")
        assert command.ref == "real.npz" and command.num_images == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "cond", "fp16"),
    [
        ("--cond --fp16", True, True),
        ("--cond=1 --fp16=1", True, True),
        ("--cond 1 --fp16 0", True, False),
        ("--cond=true --fp16=False", True, False),
        ("--cond=0", False, None),
        ("", None, None),
    ],
)
def test_switches_take_no_value_or_the_published_ones(words: str, cond: bool | None, fp16: bool | None) -> None:
    command = parses(f"edm/finetune.py --data d.zip --outdir runs/a {words} --lr 1e-4")
    assert (command.cond, command.fp16, command.lr) == (cond, fp16, 1e-4)  # type: ignore[attr-defined]


def test_another_value_of_a_switch_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("edm/finetune.py", "--data", "d.zip", "--outdir", "runs/a", "--cond=yes") == 2
    assert capsys.readouterr().err == "edm/finetune.py: --cond=yes: expected no value, or one of 1, true, 0, false\n"


@pytest.mark.parametrize(
    "command",
    [
        "neon sample --network a --outdir b --num_images 1 --num_steps 5",
        "neon evaluate --network a --ref c --num_images 1 --steps 5",
        "edm/sample.py --network_pkl a --outdir b --steps 5",
        "imm/sample.py --model_ckpt a --outdir b --steps 5",
        "xAR/sample.py --model_ckpt a --outdir b --N 1 --num_steps 5",
    ],
)
def test_steps_are_spelled_alike_wherever_a_sampler_has_them(command: str) -> None:
    parsed = parses(command)
    found = {getattr(parsed, name, None) for name in ("num_steps", "flow_steps")}
    found.add(getattr(getattr(parsed, "settings", None), "num_steps", None))
    assert 5 in found


def test_version_and_bare_neon(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"neon {__version__}\n"
    assert app.main([]) == 0
    bare = capsys.readouterr().out
    assert app.main(["--help"]) == 0
    assert bare == capsys.readouterr().out


def test_a_shell_completes_commands_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--print-completion", "bash"]) == 0
    (tmp_path / "neon.bash").write_text(capsys.readouterr().out)
    script = """
        source neon.bash
        complete_last() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tyro_neon; echo "${COMPREPLY[*]}"; }
        complete_last neon rep
        complete_last neon sample --format ""
    """
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.stdout.splitlines(), ran.stderr) == (["report reproduce", "png shards"], "")


def test_completion_for_a_shell_that_it_is_not_written_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["fish"], []):
        assert app.main(["--print-completion", *words]) == 2
        assert "expected one of bash, zsh" in capsys.readouterr().err
    assert app.main(["--print-completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef neon")


def test_a_mistyped_command_is_one_line_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["selftrian"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "did you mean selftrain?" in line


def test_help_of_neon_names_every_command_and_a_program_of_each_architecture(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for name in app.COMMANDS:
        assert re.search(rf"^  {name} ", printed, re.MULTILINE), name
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
                # What a recipe says is in a file, which tests/test_merging_document.py makes.
                if ours.search(line) and "--recipe" not in line and "--print-completion" not in line:
                    parses(line)
                    found += 1
    assert found > 30


@EVERY
def test_a_flag_is_stated_once(name: str) -> None:
    """No field hides another of the same flag: nested settings do not repeat what stands beside them."""
    seen: list[str] = []
    for key, hint in get_type_hints(program(name)).items():
        seen += [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else [key]
    assert len(seen) == len(set(seen))
