"""The `neon` command. Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 Ctrl-C, 143 SIGTERM."""

import contextlib
import difflib
import inspect
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

import tyro

from neon import __version__
from neon.cli.command_line import Command, exit_code, run_program
from neon.errors import RequestError

COMMANDS = {
    "demo": "improve:Demo",
    "improve": "improve:Improve",
    "sample": "programs:Sample",
    "selftrain": "programs:Selftrain",
    "merge": "checkpoints:Merge",
    "evaluate": "programs:Evaluate",
    "tune": "choose:Tune",
    "frontier": "frontier:MeasureFrontier",
    "align": "choose:Align",
    "report": "choose:WriteReport",
    "features": "features:MakeFeatures",
    "stats": "programs:Stats",
    "fid": "programs:Fid",
    "inspect": "inspect:Inspect",
    "diff": "diff:Diff",
    "convert": "checkpoints:Convert",
    "download": "download:Download",
    "reproduce": "reproduce:Reproduce",
    "push": "push:Push",
    "doctor": "doctor:Doctor",
}
"""module and class of each command; a new one is one row"""
SHELLS = ("bash", "zsh")
"""that `--print-completion` writes a script for"""
WIDTH = 100


def command(name: str) -> type[Command]:
    """The class of command `name`."""
    module, _, cls = COMMANDS[name].partition(":")
    return getattr(import_module(f"neon.cli.{module}"), cls)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are one line on stderr."""
    name, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        return exit_code("neon", lambda: print(overview()))
    if name == "--version":
        return exit_code("neon", lambda: print(f"neon {__version__}"))
    if name == "--print-completion":
        return exit_code("neon", lambda: print_completion(words))
    if name in COMMANDS:
        return run_program(command(name), words, name=f"neon {name}")

    def refuse() -> None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {close[0]}? " if close else ""
        raise RequestError(f"{name}: unknown command; {advice}There are {', '.join(COMMANDS)}")

    return exit_code("neon", refuse)


def print_completion(words: Sequence[str]) -> None:
    """Print the script that completes commands, flags and their values in the shell that `words` name."""
    if len(words) != 1 or words[0] not in SHELLS:
        found = " ".join(words) or "nothing"
        raise RequestError(f"--print-completion: found {found}; expected one of {', '.join(SHELLS)}")
    with contextlib.suppress(SystemExit):  # how tyro ends, the script being printed
        tyro.extras.subcommand_cli_from_dict(
            {name: command(name) for name in COMMANDS},
            prog="neon",
            args=["--tyro-write-completion", words[0], "-"],
            config=(tyro.conf.FlagCreatePairsOff,),
            use_underscores=True,
        )


def overview() -> str:
    """What `neon --help` prints."""
    return "\n".join(
        [
            "Neon improves a trained image generator by stepping away from its own self-training:",
            "theta_neon = (1 + w) theta_base - w theta_self_trained.",
            "",
            "Example: neon demo --out runs/demo",
            "",
            "Commands (their flags: neon COMMAND --help):",
            *(_line(name, inspect.cleandoc(command(name).__doc__ or "").split("\n\n")[0]) for name in COMMANDS),
            "",
            "edm/, VAR/, xAR/ and imm/ hold programs with the published flags: python edm/sample.py --help",
            "Completion of commands and flags in a shell: neon --print-completion bash (or zsh)",
        ]
    )


def _line(name: str, text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)
