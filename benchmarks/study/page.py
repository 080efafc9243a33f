"""docs/study.md, of the records: `template.md` with tables, verdicts and figures in the places that it names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from study.claims import Rows, at_same_sampler, mean, verdicts
from study.summary import Estimate, by_method, differences_of, estimate, fair_row, values_of

TEMPLATE = Path(__file__).parent / "template.md"
COLUMNS = (
    "method", "calls", "distance", "sd: blocks, seeds, bases", "second", "against the base's best", "range", "w",
    "precision, recall", "extra", "n",
)  # fmt: skip
NOTHING = "Not measured yet."


def _as_lines(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _deviations(found: Estimate) -> str:
    spreads = found.blocks, found.seeds, found.bases
    return ", ".join("-" if one is None else f"{one.deviation:.2f}" for one in spreads)


def _range(values: Iterable[float], sign: str = "", digits: int = 2) -> str:
    ends = sorted(values)
    low, high = (f"{end:{sign}.{digits}f}" for end in (ends[0], ends[-1]))
    return low if low == high else f"{low} to {high}"


def cells(rows: Rows, own: Rows) -> list[str]:
    """A method in the table of its family."""
    first = own[0]
    distance = estimate(values_of(own))
    second = estimate(values_of(own, next(iter(first["blocks"][0]["beside"]))))
    difference, ranges = "", ""
    if any(fair_row(rows, row) is not row for row in own):
        gaps = differences_of(rows, own)
        found = estimate(gaps)
        difference = f"{found.mean:+.2f}" + ("" if found.blocks is None else f" ± {found.blocks.half_width:.2f}")
        ranges = "" if len(gaps) == 1 else _range((sum(gap) / len(gap) for gap in gaps.values()), "+")
    shares = (f"{estimate(values_of(own, score=score)).mean:.2f}" for score in ("precision", "recall"))
    extra = [f"{first[key]:,}" for key in ("images_sampled", "images_trained") if first[key]]
    return [
        first["method"],
        "-" if first["calls"] is None else str(first["calls"]),
        f"{distance.mean:.2f}",
        _deviations(distance),
        f"{second.mean:.2f}",
        difference,
        ranges,
        "" if first["of_base"] else _range(row["w"] for row in own),
        ", ".join(shares),
        " + ".join(extra) or "0",
        f"{sum(len(row['blocks']) for row in own)} x {first['n']:,}",
    ]


def table(rows: Rows, shown: Rows) -> str:
    """The methods of `shown`, held against the bases in `rows`."""
    if not shown:
        return NOTHING
    lines = [cells(rows, own) for own in by_method(shown).values()]
    return _as_lines([COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *lines])


def samplers(shown: Rows) -> str:
    """What the best samplers of the bases are."""
    found = []
    for row in shown:
        if row["of_base"] and "best" in row["method"]:
            settings = ", ".join(
                f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row["settings"].items()
                if not key.startswith("S_")
            )
            found.append(f"- {row['method']}, base {row['base']}: {settings}.")
    return "\n".join(found)


def claims(rows: Rows) -> str:
    """What the paper says, with verdicts."""
    found = [(one.claim, f"**{one.verdict}**", one.figures) for one in verdicts(rows)]
    return _as_lines([("claim", "verdict", "figures"), ("---", "---", "---"), *found]) if found else NOTHING


def sentence(rows: Rows) -> str:
    """What Neon is for, as far as the rows of EDM bear it: over all bases and seeds of S."""
    rows = [row for row in rows if row["family"] == "edm"]
    names = "base", "base, best levels", "base, 10 Heun", "base, 18 Heun"
    base, fair, some, many = ([row for row in rows if row["method"] == name] for name in names)
    neon, short = ([row for row in rows if row["method"] == f"Neon, best levels{name}"] for name in ("", ", 12 steps"))
    if not (neon and fair and base):
        return NOTHING

    def distances(found: Rows) -> str:
        return _range((mean(row) for row in found), digits=1)

    more = [f"{found[0]['calls']} calls for {distances(found)}" for found in (some, many) if found]
    gaps = [sum(gap) / len(gap) for gap in differences_of(rows, neon).values()]
    return (
        "**Neon buys network calls: it gives a sampler of few steps what the base needs many for.**\n"
        f"On {len(base)} EDMs of Fashion-MNIST, {neon[0]['calls']} calls with Neon and tuned noise levels come to a "
        f"distance of {distances(neon)}{f' ({distances(short)} with a shorter self-training)' if short else ''}; the "
        f"bases take {' and '.join(more) or 'more'}.\n"
        f"{base[0]['calls']} calls of the bases give {distances(base)} as they are and {distances(fair)} with tuned "
        f"levels, against which Neon gains {_range(-gap for gap in gaps)} over bases and synthetic sets S (the images "
        "that the base itself has drawn, which it is then trained on)."
    )


def missing(planned: Mapping[str, Sequence[str]], records: Mapping[str, Rows]) -> str:
    """Rows that were planned and are not there."""
    lines = []
    for tier, names in planned.items():
        there = {row["name"] for row in records.get(tier, ())}
        if left := [name for name in names if name not in there]:
            lines.append(f"- Tier {tier}, {len(left)} of {len(names)} rows: {'; '.join(left)}.")
    return "\n".join(lines) or "All rows that were planned are there."


def page(records: Mapping[str, Rows], planned: Mapping[str, Sequence[str]]) -> str:
    """The whole document."""
    every = [row for rows in records.values() for row in rows]

    def shown(key: str) -> Rows:
        tier, family = key.split("_")
        own = [row for row in records.get(tier, ()) if row["family"] == family]
        bases = (at_same_sampler(every, row) for row in own)  # which another tier may hold
        others = {row["name"]: row for row in bases if row is not None and row not in own}
        return [*others.values(), *own]

    template = TEMPLATE.read_text()
    found: dict[str, Any] = {
        "sentence": sentence(every), "claims": claims(every), "missing": missing(planned, records)
    }  # fmt: skip
    for name in re.findall(r"\$(\w+)", template):
        kind, _, key = name.partition("_")
        if kind == "table":
            found[name] = table(every, shown(key))
        elif kind == "samplers":
            found[name] = samplers(shown(key))
    return Template(template).substitute(found)
