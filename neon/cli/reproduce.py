"""`neon reproduce`: a published score, measured again by the architecture's own program, and compared."""

import difflib
import json
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from neon.cli.command_line import at_least_one, between, parse
from neon.cli.download import fetch, look
from neon.cli.flags import Device, File
from neon.errors import RequestError, WorkError, reason
from neon.published import IMAGES, Evaluation, Published
from neon.runtime.files import check_writable, write_json
from neon.runtime.published_files import PublishedFile, published_files

if TYPE_CHECKING:
    from neon.runtime.distributed import Processes

TOLERANCE = 0.03
"""of a published FID, within which another is taken for the same: a choice, seeds and GPUs move what is measured"""
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "torch-fidelity")
"""whose versions a record names"""
OPENED = ("vae", "inception")
"""kinds of files that programs find where they usually lie"""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Measure a published FID again, and say whether it is met.

    Fetches the checkpoint of Neon and what its evaluation needs, as `neon download` does, scores it with
    calculate_fid.py of its architecture by the published protocol, and compares: within 3% counts as the same. Under
    torchrun (`-m neon.cli reproduce NAME`) on several GPUs; a killed one goes on. The record, reproduced/NAME.json,
    names files by their hashes and no place on this machine: contribute it. Exit code: 0 the score is met, or too few
    images to tell, 1 it is not.

    Example: neon reproduce Neon_EDM_conditional_CIFAR10
    """

    name: tyro.conf.Positional[str | None] = None
    """the checkpoint, one of --list"""
    list: bool = False
    """print what can be reproduced, what it costs, and which files are missing; also without a name"""
    num_images: int | None = None
    """fewer than the published 50,000: a quick try, whose score does not compare"""
    batch_size: int = 64
    """images per forward pass of one process; moves the score by rounding only"""
    device: Device = None
    """by default a GPU where there is one"""
    json: File = None
    """the record; by default reproduced/NAME.json, of a quick try reproduced/NAME-IMAGES.json"""

    def __call__(self) -> int:
        """Evaluate and compare, or list; the exit code."""
        at_least_one(batch_size=self.batch_size)
        between(1, IMAGES, num_images=self.num_images)
        if self.list or self.name is None:
            print_list()
            return 0
        released = released_scores()
        if self.name not in released:
            close = difflib.get_close_matches(self.name, released, n=1, cutoff=0.4)
            advice = f"did you mean {close[0]}? " if close else ""
            known = ", ".join(released)
            raise RequestError(f"{self.name}: no published score of that name; {advice}There are {known}")
        from neon.runtime.distributed import processes

        with processes(self.device) as group:
            return self.measure(*released[self.name], group)

    def measure(self, architecture: str, row: Published[Any], evaluation: Evaluation, group: "Processes") -> int:
        """Run the program and compare; the exit code."""
        count = self.num_images or IMAGES
        suffix = "" if count == IMAGES else f"-{count}"
        record = self.json or Path("reproduced", f"{evaluation.name}{suffix}.json")
        group.on_main(lambda: check_writable(record, overwrite=True))
        places = group.on_main(lambda: fetched(architecture, evaluation))
        checkpoint, statistics = (str(places[name]) for name in (evaluation.checkpoint, evaluation.statistics))
        flags = ["--batch_size", str(self.batch_size), "--json", str(record)]
        flags += [] if self.device is None else ["--device", self.device]
        module, _, cls = evaluation.program.partition(":")
        words = [*evaluation.words(checkpoint, statistics, count), *flags]
        parse(getattr(import_module(module), cls), words, f"neon reproduce {evaluation.name}")()
        return group.on_main(lambda: conclude(row, evaluation, record, places, group))


def released_scores() -> dict[str, tuple[str, Published[Any], Evaluation]]:
    """By the name of each merge that was released: its architecture, the row of its network, how it was scored."""
    from neon.model import GROUP

    found = {}
    for entry in entry_points(group=GROUP):
        tables = f"{entry.module.rpartition('.')[0]}.published"
        rows = import_module(tables).PUBLISHED.values() if find_spec(tables) is not None else ()
        found.update({row.neon.name: (entry.name, row, row.neon) for row in rows if row.neon is not None})
    return found


def needed(architecture: str, evaluation: Evaluation) -> list[PublishedFile]:
    """The files that an evaluation opens."""
    named = (evaluation.checkpoint, evaluation.statistics)
    return [
        file
        for file in published_files()
        if file.name in named or (file.kind in OPENED and architecture in file.architectures)
    ]


def fetched(architecture: str, evaluation: Evaluation) -> dict[str, Path]:
    """Where each file that an evaluation opens lies, by its name; what is missing is fetched.

    Raises:
        RequestError, WorkError: one can not be.
    """
    places = {}
    for file in needed(architecture, evaluation):
        found, _ = look(file)
        if found is None:
            print(f"fetching {file.name}", flush=True)
            try:
                fetch(file, set())
            except (RequestError, WorkError, OSError) as error:
                failed = WorkError if isinstance(error, OSError) else type(error)
                raise failed(
                    f"{file.name} ({file.kind}) is missing: {reason(error)}; get it with `neon download --only "
                    f"{architecture}`, or save it as {file.places[0]}"
                ) from error
            found = Path(file.places[0])
        places[file.name] = found
    return places


def print_list() -> None:
    """What can be reproduced, one line each, and how."""
    print(f"{'name':<32} {'base':>5} {'Neon':>5} {'calls/image':>11}  files (scores: FID of {IMAGES:,} images)")
    for name, (architecture, row, evaluation) in released_scores().items():
        missing = [file for file in needed(architecture, evaluation) if look(file)[0] is None]
        megabytes = sum(file.megabytes or 0 for file in missing)
        state = f"{len(missing)} missing, {megabytes:,} MB to come" if missing else "at hand"
        print(f"{name:<32} {row.fid_base:>5.2f} {row.fid_neon:>5.2f} {evaluation.calls:>11}  {state}")
    print("neon reproduce NAME measures one; --num_images 1000 tries it on few images, whose score does not compare")


def conclude(
    row: Published[Any], evaluation: Evaluation, record: Path, places: dict[str, Path], group: "Processes"
) -> int:
    """Make a record to contribute of what the program wrote to `record`, and say how it compares; the exit code."""
    assert row.fid_neon is not None
    measured = json.loads(record.read_bytes())
    names = {str(place): name for name, place in places.items()}
    measured = {key: names.get(value, value) if isinstance(value, str) else value for key, value in measured.items()}
    value, count = measured[measured["metric"]], measured["num_images"]
    ratio = value / row.fid_neon - 1
    compares = count == IMAGES
    met = abs(ratio) <= TOLERANCE
    verdict = ("reproduced" if met else "lower" if ratio < 0 else "higher") if compares else "does not compare"
    write_json(
        record,
        {
            "name": evaluation.name,
            "verdict": verdict,
            "published": {"fid": row.fid_neon, "fid_of_base": row.fid_base, "num_images": IMAGES},
            "tolerance": TOLERANCE,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "hardware": _hardware(group),
            "flags": evaluation.words("CHECKPOINT", "STATISTICS", count),
            "measured": measured,
        },
    )
    against = f"the published {row.fid_neon:.2f} of {IMAGES:,}"
    if not compares:
        text = f"{value:.2f} of {count:,} images does not compare with {against}: fewer images score higher"
    elif met:
        text = f"reproduced, {value:.2f} against {against} ({ratio:+.1%}; within {TOLERANCE:.0%} is the same)"
    else:
        text = f"not reproduced, {value:.2f} is {verdict} than {against} ({ratio:+.1%}, more than {TOLERANCE:.0%})"
    print(f"{evaluation.name}: {text}; {record}", flush=True)
    return 0 if met or not compares else 1


def _hardware(group: "Processes") -> str:
    """What computed: GPUs by their name, else the kind of processor."""
    import torch

    if group.device.type == "cuda":
        return f"{group.world_size} x {torch.cuda.get_device_name(group.device)}"
    return f"CPU, {platform.machine()}"
