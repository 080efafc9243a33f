"""Make docs/study.md and its figures from the records of the study: `python benchmarks/study_page.py`.

What rows say together, with three kinds of intervals, goes to benchmarks/results/study_methods.json.
"""

import json
from pathlib import Path
from typing import Any

from small_study import ROOT
from study import figures
from study.page import page
from study.record import title
from study.summary import summaries
from study.tiers import TIERS

from neon.runtime.files import write_json

RESULTS = Path(__file__).parent / "results"
METHODS = RESULTS / "study_methods.json"
PAGE = ROOT / "docs" / "study.md"


def records() -> dict[str, list[dict[str, Any]]]:
    """The rows of each tier in the order of the plan."""
    found: dict[str, list[dict[str, Any]]] = {}
    for tier, plans in TIERS.items():
        path = RESULTS / f"study_{tier}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else {}
        order = [title(plan) for plan in plans()]
        found[tier] = [{**rows[name], "name": name} for name in order if name in rows]
    return found


def text() -> str:
    """The document."""
    planned: dict[str, list[str]] = {tier: [title(plan) for plan in plans()] for tier, plans in TIERS.items()}
    return page(records(), planned)


def main() -> None:
    """Write the document and its figures."""
    PAGE.write_text(text())
    found = records()
    write_json(METHODS, summaries([row for rows in found.values() for row in rows]))
    rows = found["A"]
    figures.frontier(rows, PAGE.with_name("study-frontier.png"))
    figures.budget_and_size(rows, PAGE.with_name("study-budget.png"))
    figures.along_w(rows, PAGE.with_name("study-w.png"))


if __name__ == "__main__":
    main()
