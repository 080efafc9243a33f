"""The pictures of `toy_appendix.ipynb`."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neon.metrics import Statistics
from neon.report.plots import BASE, GREY, INK, NEON
from neon.toy.study import DATA, STARTS, Study

SELF_TRAINED = "#c77d0a"
SAMPLERS = {"mode-seeking": NEON, "diversity-seeking": "#2b8a3e"}
MARKERS = dict(zip(STARTS, "v^o", strict=True))
DPI = 72


class Picture(Figure):
    """A figure that a notebook shows as PNG by itself, whatever matplotlib's backend."""

    def __init__(self, width: float, height: float) -> None:
        """Sizes in inches."""
        super().__init__(figsize=(width, height), dpi=DPI, layout="constrained")

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", facecolor="white")
        return buffer.getvalue()


def samplers(studies: Sequence[Study]) -> Picture:
    """Per model: the points of one base, and what the base samples plainly and with either sampler."""
    figure = Picture(9.5, 4.6)
    for axes, study in zip(figure.subplots(1, len(studies)), studies, strict=True):
        toy, example = study.toy, study.example
        _plane(axes, study)
        _ellipse(axes, example.base, BASE, f"base, {toy.knob} 1")
        for name, knob in toy.samplers.items():
            _ellipse(axes, example.synthetic[name], SAMPLERS[name], f"{name}, {toy.knob} {knob:g}")
        axes.set_title(f"{toy.name}, base of {toy.num_points:,} points")
        axes.legend(loc="lower right", fontsize=8)
    return figure


def models(studies: Sequence[Study]) -> Picture:
    """Per model and sampler of the synthetic set: base, self-trained and Neon, all sampled plainly."""
    figure = Picture(9.5, 9)
    for row, study in zip(figure.subplots(len(studies), 2), studies, strict=True):
        example = study.example
        for axes, name in zip(row, SAMPLERS, strict=True):
            _plane(axes, study)
            _ellipse(axes, example.base, BASE, "base, w = 0")
            _ellipse(axes, example.self_trained[name], SELF_TRAINED, "self-trained, w = -1")
            _ellipse(axes, example.neon[name], NEON, f"best merge, w = {example.best_w[name]:+.2f}")
            axes.set_title(f"{study.toy.name}, {name}")
            axes.legend(loc="lower right", fontsize=8)
    return figure


def curves(studies: Sequence[Study], *, same: bool = False) -> Picture:
    """Per model and sampler of the synthetic set: distance against w, mean and range over bases.

    The samples come from the plain sampler; with `same` from the one that the synthetic set came from.
    """
    figure = Picture(9.5, 6.6)
    for row, study in zip(figure.subplots(len(studies), 2, sharex=True), studies, strict=True):
        for axes, name in zip(row, SAMPLERS, strict=True):
            by_budget = (study.same if same else study.plain)[name]
            for budget, (steps, line) in enumerate(zip(study.toy.budgets, ("--", "-"), strict=True)):
                distances = by_budget[:, budget]
                mean, w = distances.mean(0), study.best_w(name, budget, same=same)
                axes.fill_between(study.ws, distances.min(0), distances.max(0), color=SAMPLERS[name], alpha=0.15, lw=0)
                axes.plot(study.ws, mean, line, color=SAMPLERS[name], label=f"{steps} steps, best w {w:+.2f}")
                axes.plot(w, mean.min(), "o", color=SAMPLERS[name])
            axes.axvline(0, color=GREY, lw=0.8)
            axes.set_yscale("log")
            axes.set_title(f"{study.toy.name}, {name} S")
            axes.set_ylabel("Fréchet distance")
            axes.legend(fontsize=8)
        for axes in row if study is studies[-1] else []:
            axes.set_xlabel("w   (-1: self-trained, 0: base)")
    return figure


def cosines(studies: Sequence[Study]) -> Picture:
    """Per model: the cosine of gradients against the knob of the synthetic set's sampler, each base a line."""
    figure = Picture(9.5, 3.6)
    for axes, study in zip(figure.subplots(1, len(studies), sharey=True), studies, strict=True):
        toy = study.toy
        axes.plot(toy.knobs, study.cosines.T, color=GREY, lw=0.7, alpha=0.6)
        axes.plot(toy.knobs, study.cosines.mean(0), color=INK, lw=2, label="mean over bases")
        for name, knob in toy.samplers.items():
            axes.plot(knob, study.cosine(name).mean(), "o", color=SAMPLERS[name], label=name)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.axvline(1, color=GREY, lw=0.8, ls=":")
        axes.set(title=toy.name, xlabel=f"{toy.knob} of S", ylabel="cosine of gradients", ylim=(-1.05, 1.05))
        axes.legend(fontsize=8)
    return figure


def boundary(by_start: Sequence[Sequence[Study]]) -> Picture:
    """Per model, each base a point: cosine and best w of the mode-seeking sampler against the base's spread."""
    figure = Picture(9.5, 6.6)
    name = "mode-seeking"
    for axes, of_model in zip(figure.subplots(2, len(by_start), sharex="col").T, by_start, strict=True):
        for study in of_model:
            ratio = np.exp(study.spreads)
            for panel, values in zip(axes, (study.cosine(name), study.best_ws(name)), strict=True):
                panel.plot(ratio, values, MARKERS[study.start], color=NEON, alpha=0.7, label=study.start)
        for panel, label in zip(axes, ("cosine of gradients", "best w"), strict=True):
            panel.axhline(0, color=GREY, lw=0.8)
            panel.axvline(1, color=GREY, lw=0.8, ls=":")
            panel.set(ylabel=label, ylim=(-1.1, 1.1))
        axes[0].set_title(f"{of_model[0].toy.name}, {name} S")
        axes[0].legend(title="base", fontsize=8)
        axes[1].set_xlabel("standard deviation of the base over that of the data")
    return figure


def _plane(axes: Axes, study: Study) -> None:
    points = study.example.points
    axes.plot(*points.numpy().T, ".", color=GREY, alpha=0.3, ms=4, label="points of the base")
    _ellipse(axes, DATA, INK, "data", ls=":")
    axes.set(xlim=(-4, 5), ylim=(-5, 4), aspect="equal")


def _ellipse(axes: Axes, statistics: Statistics, colour: str, label: str, ls: str = "-") -> None:
    """The line of two standard deviations."""
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    x, y = statistics.mu[:, None] + 2 * np.linalg.cholesky(statistics.sigma) @ circle
    axes.plot(x, y, ls, color=colour, lw=1.8, label=label)
