"""What the paper says of Neon, held against the rows: held, not held or undecided, each with its figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study.summary import estimate, fair_row, spread, values_of
from study.tiers import METHODS_OF_SIZES, METHODS_OF_STEPS

Row = Mapping[str, Any]
Rows = Sequence[Row]
HELD, FAILED, OPEN = "held", "not held", "undecided"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one claim."""

    claim: str
    verdict: str
    figures: str


def mean(row: Row, score: str = "distance") -> float:
    """Over the blocks of a row."""
    return estimate(values_of([row], score=score)).mean


def find(rows: Rows, method: str, family: str = "edm", base: int = 0, seed: int = 0) -> Row | None:
    """The row, if there is one."""
    wanted = family, method, base
    for row in rows:
        if (row["family"], row["method"], row["base"]) == wanted and row["seed"] in (None, seed):
            return row
    return None


def selected(row: Row) -> float:
    """The lowest distance that w was chosen by, on selection images."""
    return min(value for _, value in row["tried"] if value is not None)


def paired(row: Row, other: Row) -> tuple[float, float]:
    """(mean, half width of the 95% interval) of the difference of distances, block by block on the same seeds."""
    (own,), (others,) = values_of([row]).values(), values_of([other]).values()
    gaps = [a - b for a, b in zip(own, others, strict=False)]
    found = spread([gaps])
    return sum(gaps) / len(gaps), found.half_width if found else float("inf")


def at_same_sampler(rows: Rows, row: Row) -> Row | None:
    """The base, sampled as a row is."""
    for other in rows:
        if other["of_base"] and all(other[key] == row[key] for key in ("family", "base", "settings")):
            return other
    return None


def plain_neon(rows: Rows) -> list[Row]:
    """Rows of Neon by the book: a set of its own, the usual budget, w chosen from 0 up."""
    names = ("Neon", "Neon, best levels", "Neon, 10 Heun")
    return [row for row in rows if row["method"] in names]


def label(row: Row) -> str:
    """A row in a few words."""
    seed = "" if row["seed"] is None else f"/{row['seed']}"
    return f"{row['family']} {row['method']} ({row['base']}{seed})"


def w_in_range(rows: Rows) -> Verdict | None:
    found = plain_neon(rows)
    if not found:
        return None
    inside = [row for row in found if 0.5 <= row["w"] <= 1.5]
    ws = sorted(row["w"] for row in found)
    share = len(inside) / len(found)
    outside = ", ".join(f"{label(row)}: {row['w']:g}" for row in found if row not in inside)
    return Verdict(
        claim="the best w lies between 0.5 and 1.5",
        verdict=HELD if share == 1 else FAILED if share < 0.5 else OPEN,
        figures=f"{len(inside)} of {len(found)} choices, from {ws[0]:g} to {ws[-1]:g}"
        + (f"; outside: {outside}" if outside else ""),
    )


def thousand_suffice(rows: Rows) -> Verdict | None:
    small, usual, large = (find(rows, name) for name in METHODS_OF_SIZES.values())
    if not (small and usual and large):
        return None
    gain, half = paired(large, usual)
    verdict = HELD if gain + half > 0 else FAILED
    short = [f"{mean(row):.2f}" for row in rows if row["method"] == METHODS_OF_STEPS[12] and row["base"] == 0]
    return Verdict(
        claim="1,000 images in S suffice",
        verdict=verdict,
        figures=f"50 steps on S of 250, 1,000, 4,000: {mean(small):.2f}, {mean(usual):.2f}, {mean(large):.2f}; 4,000 "
        f"against 1,000 {gain:+.2f} ± {half:.2f}"
        + (f"; but 12 steps on sets of 1,000 give {' and '.join(short)}" if short else ""),
    )


def budget_is_u_shaped(rows: Rows) -> Verdict | None:
    found = {steps: row for steps, name in METHODS_OF_STEPS.items() if (row := find(rows, name)) is not None}
    if len(found) < 4:
        return None
    best = min(found, key=lambda steps: mean(found[steps]))
    inside = best not in (min(found), max(found))
    (to_least, least_half), (to_most, most_half) = (paired(found[end], found[best]) for end in (min(found), max(found)))
    text = ", ".join(f"{steps}: {mean(row):.2f} (w {row['w']:g})" for steps, row in found.items())
    # The best of these was found by looking at them; whether it is holds elsewhere only.
    again = [
        (f"{row['base']}/{row['seed']}", *paired(row, usual))
        for row in rows
        if row["method"] == METHODS_OF_STEPS[best]
        and (row["base"], row["seed"]) != (0, 0)
        and (usual := find(rows, "Neon", base=row["base"], seed=row["seed"])) is not None
    ]
    if again:
        others = ", ".join(f"{where} {gain:+.2f} ± {half:.2f}" for where, gain, half in again)
        text += f"; {best} against 50 steps on other bases and sets (base/seed): {others}"
    confirmed = all(gain + half < 0 for _, gain, half in again)
    certain = inside and to_least > least_half and to_most > most_half and confirmed
    return Verdict(
        claim="the distance is U-shaped in the budget of self-training",
        verdict=HELD if certain else OPEN if inside else FAILED,
        figures=f"by steps, w chosen for each: {text}",
    )


def recall_rises(rows: Rows) -> Verdict | None:
    found = [(row, base) for row in plain_neon(rows) if row["w"] and (base := at_same_sampler(rows, row))]
    if not found:
        return None
    recall = [(row, base) for row, base in found if mean(row, "recall") > mean(base, "recall")]
    precision = [(row, base) for row, base in found if mean(row, "precision") < mean(base, "precision")]
    others = "; ".join(
        f"{label(row)}: precision {mean(base, 'precision'):.2f} to {mean(row, 'precision'):.2f}, recall "
        f"{mean(base, 'recall'):.2f} to {mean(row, 'recall'):.2f}"
        for row, base in found
        if (row, base) not in recall or (row, base) not in precision
    )
    both = len(recall) == len(precision) == len(found)
    return Verdict(
        claim="recall rises and precision falls",
        verdict=HELD if both else FAILED if 2 * min(len(recall), len(precision)) <= len(found) else OPEN,
        figures=f"recall is above that of the base at the same sampler in {len(recall)}, precision below it in "
        f"{len(precision)} of {len(found)} rows" + (f"; not so: {others}" if others else ""),
    )


def beats_the_best_base(rows: Rows) -> Verdict | None:
    texts, certain, asked = [], 0, 0
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row for row in plain_neon(rows) if row["family"] == family]
        for base, seed in sorted({(row["base"], row["seed"]) for row in of_family}):
            own = [row for row in of_family if (row["base"], row["seed"]) == (base, seed)]
            neon = min(own, key=selected)  # the sampler of the two that did better on selection images
            fair = fair_row(rows, neon)
            if fair is neon:
                continue
            gain, half = paired(neon, fair)
            asked += 1
            certain += gain + half < 0
            texts.append(f"{family} {base}/{seed} {mean(fair):.1f} {gain:+.1f} ± {half:.1f}")
    if not asked:
        return None
    return Verdict(
        claim="Neon gains beyond the base's best sampler of as many calls (not in the paper)",
        verdict=HELD if certain == asked else FAILED if not certain else OPEN,
        figures=f"beyond the noise in {certain} of {asked}: {'; '.join(texts)} (base/seed, its best, difference)",
    )


def direction_matters(rows: Rows) -> Verdict | None:
    base, neon = find(rows, "base"), find(rows, "Neon")
    names = "random direction", "weight noise", "real images (w = -1)", "away from real images", "average (w = -0.5)"
    found = [row for name in names if (row := find(rows, name)) is not None]
    if not (base and neon and found):
        return None
    gains = {row["method"]: paired(row, base) for row in (neon, *found)}
    own = gains.pop("Neon")[0]
    text = ", ".join(f"{name} {gain:+.1f} ± {half:.1f}" for name, (gain, half) in gains.items())
    return Verdict(
        claim="what gains is the direction (controls that reviewers asked for)",
        verdict=HELD if min(gain for gain, _ in gains.values()) > 0.1 * own else FAILED,
        figures=f"against the base at 5 Euler steps: Neon {own:+.1f}; {text}",
    )


def sign_flips(rows: Rows) -> Verdict | None:
    names = (("edm", "Neon, noisy"), ("VAR", "Neon, guidance 1, temperature 1.3"))
    asked = [*plain_neon(rows), *(row for family, name in names if (row := find(rows, name, family)) is not None)]
    pairs = [(row, base) for row in asked if (base := at_same_sampler(rows, row))]
    diverse = [(row, base) for row, base in pairs if mean(base, "recall") > mean(base, "precision")]
    if not diverse:
        return None
    flips = sum(row["w"] < 0 for row, _ in diverse)
    text = "; ".join(
        f"{label(row)}: w {row['w']:g}, precision {mean(base, 'precision'):.2f}, recall {mean(base, 'recall'):.2f}"
        for row, base in diverse
    )
    return Verdict(
        claim="the best w is below 0 where the sampler seeks diversity",
        # Shares are a rough sign of what a sampler seeks: none of these need be one that the paper means.
        verdict=HELD if flips == len(diverse) else OPEN,
        figures=f"below 0 in {flips} of {len(diverse)} rows whose base has more recall than precision, which is a "
        f"rough sign of such a sampler (not all of their searches looked below 0): {text}",
    )


def once_only(rows: Rows) -> Verdict | None:
    pairs = [
        (once, twice)
        for name in ("whole", "half")
        if (once := find(rows, f"Neon once, {name} step")) and (twice := find(rows, f"Neon twice, {name} first step"))
    ]
    if not pairs:
        return None
    whole = find(rows, "Neon once, whole step")
    best_twice = min((twice for _, twice in pairs), key=mean)
    assert whole is not None
    gain, half = paired(best_twice, whole)
    text = "; ".join(
        f"{twice['method']}: {mean(once):.2f}, then {mean(twice):.2f} at w {twice['w']:g}" for once, twice in pairs
    )
    return Verdict(
        claim="Neon is applied once (the paper does not study more; others say that it cannot be repeated)",
        verdict=FAILED if gain + half < 0 else OPEN if gain < 0 else HELD,
        figures=f"{text}; the better of two rounds against one whole {gain:+.2f} ± {half:.2f}",
    )


def converged(rows: Rows) -> Verdict | None:
    base = find(rows, "base, 18 Heun")
    found = [row for name in ("Neon, 18 Heun", "Neon at w = 0.25, 18 Heun") if (row := find(rows, name)) is not None]
    if not (base and found):
        return None
    gaps = [(row, *paired(row, base)) for row in found]
    certain = any(gain + half < 0 for _, gain, half in gaps)
    least = min(gain for _, gain, _ in gaps)
    text = ", ".join(f"w {row['w']:g} {gain:+.2f} in {len(row['blocks'])} block(s)" for row, gain, _ in gaps)
    return Verdict(
        claim="an unbiased sampler leaves nothing to gain (theory; in the paper 18 Heun steps still gain)",
        verdict=FAILED if certain else HELD if least >= 0 else OPEN,
        figures=f"18 Heun steps, base {mean(base):.2f}; {text}",
    )


def foreign_sets(rows: Rows) -> Verdict | None:
    found = [row for row in rows if row["method"].startswith("Neon, S of ") and not row["method"][11].isdigit()]
    if not found:
        return None
    texts, good = [], 0
    for row in found:
        base, own = at_same_sampler(rows, row), find(rows, "Neon", row["family"])
        if base is None:
            continue
        gain, half = paired(row, base)
        good += row["w"] > 0 and gain + half < 0
        with_own = "" if own is None else f", with its own set {mean(own):.2f}"
        texts.append(
            f"{row['family']}, {row['method'][6:]}: {mean(row):.2f} at w {row['w']:g}, base {mean(base):.2f}{with_own}"
        )
    return Verdict(
        claim="a set of another architecture does, too",
        verdict=HELD if good == len(texts) else FAILED if not good else OPEN,
        figures="; ".join(texts),
    )


def self_training_harms(rows: Rows) -> Verdict | None:
    found = [row for row in rows if row["method"] == "self-trained (w = -1)"]
    pairs = [(row, base) for row in found if (base := at_same_sampler(rows, row))]
    if not pairs:
        return None
    worse = sum(mean(row) > mean(base) for row, base in pairs)
    text = ", ".join(
        f"{row['family']} {mean(base):.1f} to {mean(row):.1f}"
        for row, base in pairs
        if row["base"] == 0 and row["seed"] == 0
    )
    return Verdict(
        claim="self-training alone (w = -1) is worse than the base",
        verdict=HELD if worse == len(pairs) else FAILED,
        figures=f"in {worse} of {len(pairs)} rows; {text}",
    )


CLAIMS: tuple[Callable[[Rows], Verdict | None], ...] = (
    w_in_range,
    thousand_suffice,
    budget_is_u_shaped,
    recall_rises,
    sign_flips,
    once_only,
    converged,
    foreign_sets,
    self_training_harms,
    beats_the_best_base,
    direction_matters,
)


def verdicts(rows: Rows) -> list[Verdict]:
    """Of all claims that there are rows for."""
    return [verdict for claim in CLAIMS if (verdict := claim(rows)) is not None]
