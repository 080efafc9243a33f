"""When does Neon help, and against what: one tier of the study, row by row.

    python benchmarks/run_study.py A            # EDM; also B (VAR), C (xAR, IMM, digits, flow), D (beside Neon)
    python benchmarks/run_study.py A --only "Neon, base 0, seed 0" --repeat    # a row again, from nothing

Each row goes to benchmarks/results/study_<tier>.json as it is done; one that is there is not computed again, and a
killed run goes on where it was. `--repeat` computes rows in a folder of their own and compares them with the record.
`python benchmarks/study_page.py` makes docs/study.md and its figures of the records.
"""

import sys
import tempfile
from pathlib import Path

import torch
import tyro
from small_study import ROOT
from study.record import Record, differences
from study.tiers import TIERS, Name

RESULTS = Path(__file__).parent / "results"
RUN = ROOT / "runs" / "study"


def main(
    tier: Name, /, only: tuple[str, ...] = (), *, repeat: bool = False, skip: tuple[str, ...] = (), run: Path = RUN
) -> int:
    """Fill the rows of a tier.

    Args:
        tier: Which.
        only: Names of rows, or beginnings of names; by default all.
        repeat: Compute the rows again from nothing, and compare; the record stays as it is.
        skip: Names of rows, or beginnings of names, that are left out.
        run: Folder of synthetic sets, trainings and scores.
    """
    torch.set_num_threads(1)
    record = Record(RESULTS / f"study_{tier}.json")
    plans = [(family, row) for family, row in TIERS[tier]() if not only or f"{family}: {row.name}".startswith(only)]
    plans = [(family, row) for family, row in plans if not (skip and f"{family}: {row.name}".startswith(skip))]
    if not plans:
        raise SystemExit(f"--only {' '.join(only)}: no such row in tier {tier}; see benchmarks/study/tiers.py")
    if not repeat:
        record.fill(plans, run, tier)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        again = Record(Path(folder) / "again.json")
        again.fill(plans, Path(folder), tier)
        found = differences(record, again)
    print("\n".join(found) or f"{len(plans)} row(s) again from nothing: equal to the record")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
