"""Advice names flags that the command has: those in messages of the library, for every command that can raise them."""

import ast
import re
from importlib import import_module

import pytest

from neon.cli.app import COMMANDS, command
from neon.cli.command_line import _comparable, _flags_of
from tests.programs import ROOT

PROGRAMS = {
    name: command(name)
    for name in COMMANDS
} | {
    f"{folder}/{module}.py": getattr(import_module(f"{folder}.{module}"), cls)
    for folder, modules in {
        "edm": {"sample": "SampleEDM", "finetune": "TrainEDM", "calculate_fid": "ScoreEDM"},
        "VAR": {"sample": "SampleVAR", "finetune": "TrainVAR", "calculate_fid": "ScoreVAR",
                "encode": "EncodeForVAR", "train_tokenizer": "TrainTokenizer"},
        "xAR": {"sample": "SampleXAR", "finetune": "TrainXAR", "calculate_fid": "ScoreXAR", "encode": "EncodeForXAR"},
        "imm": {"sample": "SampleIMM", "finetune": "TrainIMM", "calculate_fid": "ScoreIMM", "encode": "EncodeForIMM"},
    }.items()
    for module, cls in modules.items()
}  # fmt: skip
SAMPLERS = {"sample", "evaluate", *(name for name in PROGRAMS if "sample" in name or "calculate" in name)}
TRAINERS = {"selftrain", *(name for name in PROGRAMS if "finetune" in name)}
ENCODERS = {name for name in PROGRAMS if "encode" in name}
RUNS = {*SAMPLERS, *TRAINERS, *ENCODERS, "tune", "frontier", "improve", "demo", "VAR/train_tokenizer.py"}
MERGERS = {"merge", "diff", "tune", "frontier", "align", *SAMPLERS}
SCORERS = {
    "evaluate",
    "stats",
    "fid",
    "tune",
    "frontier",
    "improve",
    "align",
    *(name for name in PROGRAMS if "calculate" in name),
}
ASKED = {"sample", "selftrain", "evaluate", "tune", "frontier", "align", "improve"}
RAISED_BY = {
    ("neon/runtime/run_folder.py", "--fresh"): RUNS,
    ("neon/runtime/trackers.py", "--log"): {*TRAINERS, "VAR/train_tokenizer.py", "tune", "improve"},
    ("neon/runtime/files.py", "--overwrite"): {"merge", "stats", "convert", "features"},
    ("neon/sampling.py", "--fresh"): {name for name in SAMPLERS if "sample" in name},
    ("neon/sampling.py", "--class"): SAMPLERS,
    ("neon/runtime/distributed.py", "--device"): RUNS - {"demo"},
    ("neon/noise.py", "--seed"): {name for name in RUNS - ENCODERS if not name.startswith("edm/")} | {"align"},
    ("neon/metrics/inception.py", "--inception-weights"): SCORERS,
    ("neon/metrics/reference.py", None): SCORERS,
    ("neon/evaluate/reference.py", None): {"tune", "frontier", "improve"},
    ("neon/merge/pair.py", None): MERGERS,
    ("neon/merge/adapters/writing.py", None): {"merge"},
    ("neon/merge/components.py", None): {"merge", "diff"},
    ("neon/merge/shards.py", None): {"merge"},
    ("neon/merge/precision.py", None): {"merge"},
    ("neon/merge/recipe.py", None): {"merge"},
    ("neon/merge/files.py", "--dtype"): {"merge"},
    ("neon/merge/files.py", "--output"): {"merge"},
    ("neon/runtime/atomic_folder.py", None): {"merge"},
    ("neon/lora/layers.py", None): {*TRAINERS, "improve"},
    ("neon/lora/settings.py", None): {*TRAINERS, "improve"},
    ("neon/lora/trained.py", None): {*TRAINERS, "improve"},
    ("neon/trained.py", "--gradient-checkpointing"): {*TRAINERS, "improve"},
    ("neon/selftrain/memory.py", None): {*TRAINERS, "improve"},
    ("neon/selftrain/run.py", "--parallel"): {*TRAINERS, "improve", "tune"},
    ("neon/selftrain/examples.py", "--precision"): {*TRAINERS, "improve"},
    ("neon/model.py", "--precision"): {*SAMPLERS, *TRAINERS, "improve"},
    ("neon/precision.py", "--precision"): {*SAMPLERS, *TRAINERS},
    ("neon/precision.py", "--tf32"): {*SAMPLERS, *TRAINERS, "improve"},
    ("neon/model.py", "--tf32"): {*SAMPLERS, *TRAINERS, "improve"},
    ("neon/runtime/compiling.py", "--compile"): {*SAMPLERS, *TRAINERS, "improve"},
    ("neon/model.py", "--loss"): {"selftrain", "improve"},
    ("neon/settings.py", "--loss"): {"selftrain", "improve"},
    ("neon/model.py", "--model"): ASKED,
    ("neon/model.py", "--prompts"): ASKED,
    ("neon/data/images.py", "--prompts"): {"selftrain", "align", "improve", "tune"},
    ("neon/data/loading.py", "--workers"): {*TRAINERS, "improve", "tune"},
    ("neon/data/augment.py", "--augment"): {"edm/finetune.py", "imm/finetune.py"},
    ("neon/report/card.py", None): {"sample"},
    ("neon/improve/plan.py", None): {"improve"},
    ("neon/improve/run.py", None): {"improve"},
    ("neon/report/unscored.py", None): {"improve"},
    ("neon/tune/inputs.py", None): {"tune", "frontier", "improve"},
    ("neon/tune/reasons.py", None): {"tune", "improve"},
    ("neon/tune/plan.py", None): {"tune"},
    ("neon/tune/scorer.py", None): {"tune"},
    ("neon/tune/frontier.py", None): {"frontier"},
    ("neon/tune/retrain.py", None): {"tune", "frontier"},
}
"""the commands that can raise a message with this flag (None: any) in it; the flags of an architecture's own files and
of `python -m neon.demo.train` are of one program only, which says them itself"""
OTHERS_FLAGS = {"--nproc-per-node", "--local-dir", "--include", "--create-dirs", "--vae"}
"""of torchrun, hf and curl; and --vae, said to be of neon's commands"""
IN_NO_MESSAGE = {
    *("neon/runtime/published_files.py", "neon/report/plots.py", "neon/improve/unscored.py", "neon/tune/outcome.py"),
}
"""the last two say commands with their flags"""
SAID_WITH_CARE = {
    ("neon/checkpoint/nestings.py", "--key"),
    ("neon/checkpoint/weight_sets.py", "--variant"),
    ("neon/data/images.py", "--resize"),
}
"""to be of some commands only"""


def flags_in_messages() -> set[tuple[str, str]]:
    """(file, flag) of every flag in a text of the library that is no docstring."""
    found = set()
    for path in ROOT.glob("neon/**/*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("neon/cli/", "neon/demo/")) or name in IN_NO_MESSAGE:
            continue
        tree = ast.parse(path.read_text())
        docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
                found |= {
                    (name, _comparable(flag)) for flag in re.findall(r"--[a-z_][a-z0-9_]*(?:-[a-z_]+)*", node.value)
                }
    return {one for one in found if one[1] not in OTHERS_FLAGS}


@pytest.mark.parametrize(("file", "flag"), sorted(flags_in_messages() - SAID_WITH_CARE))
def test_every_command_that_says_a_flag_has_it(file: str, flag: str) -> None:
    commands = RAISED_BY.get((file, flag)) or RAISED_BY.get((file, None))
    assert commands, f"{file} says {flag}: of which commands?"
    without = [name for name in commands if flag not in _flags_of(PROGRAMS[name], lambda hint: True)]
    assert not without
