"""The pictures of `toy_appendix.ipynb`."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from neon.metrics import Statistics
from neon.report.plots import BASE, GREY, INK, NEON
from neon.toy.study import DATA, STARTS, Stop, Study

SELF_TRAINED = "#c77d0a"
SAMPLERS = {"mode-seeking": "#7b3fa0", "diversity-seeking": "#2b8a3e"}
MARKERS = dict(zip(STARTS, "v^o", strict=True))
DPI = 80


class Picture(Figure):
    """A figure that a notebook shows as PNG by itself, whatever matplotlib's backend."""

    def __init__(self, width: float, height: float) -> None:
        """Sizes in inches."""
        super().__init__(figsize=(width, height), dpi=DPI, layout="constrained")

    def image(self) -> Image.Image:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", facecolor="white")
        return Image.open(buffer).convert("RGB")

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        # A third of the bytes, all of which lie in the notebook.
        self.image().quantize(128, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
        return buffer.getvalue()


class Moving:
    """Pictures one after another, for ever: an animated PNG. What shows only one picture of it shows the first."""

    def __init__(self, pictures: Sequence[Picture], seconds: float) -> None:
        """`seconds` is the time of one picture."""
        frames = [picture.image() for picture in pictures]
        colours = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames])).quantize(32, kmeans=1)
        first, *others = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
        buffer = io.BytesIO()
        first.save(buffer, "png", save_all=True, append_images=others, duration=1000 * seconds, loop=0)
        self._png = buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self._png

    def __repr__(self) -> str:
        return "<moving pictures>"


def idea(study: Study, stops: Sequence[Stop]) -> Picture:
    """What models sample, in the plane, and as a map of how wide that is; `stops` are w = -1, 0 and the best."""
    figure = Picture(10, 4.9)
    plane, chart = figure.subplots(1, 2)
    plane.plot(*stops[1].points.numpy().T, ".", color=BASE, alpha=0.35, ms=4)
    _ellipse(plane, DATA, INK, "data", ls=":")
    for stop, (colour, name) in zip(stops, _STOPS, strict=True):
        _ellipse(plane, stop.moments, colour, f"{name}, w = {stop.w:g}")
    plane.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="x1", ylabel="x2")
    plane.set_title("What the models sample")
    plane.legend(loc="upper left", fontsize=9, frameon=False)

    truth = _widths(DATA)
    self_trained, base, best = (_widths(stop.moments) for stop in stops)
    for radius in np.arange(0.2, 1.6, 0.2):
        chart.add_patch(Circle(truth, radius, fill=False, color=GREY, lw=0.5, alpha=0.5))
    chart.plot(*truth, "*", color=INK, ms=16)
    for place, (colour, _) in zip((self_trained, base, best), _STOPS, strict=True):
        chart.plot(*place, "o", color=colour, ms=10, zorder=3)
    for start, end, colour, style in ((base, self_trained, SELF_TRAINED, "-"), (base, best, NEON, "--")):
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "ls": style, "shrinkA": 6, "shrinkB": 6}
        chart.annotate("", end, start, arrowprops=arrow)
    for place, text, colour in (
        (truth, "data", INK),
        (best, "Neon", NEON),
        (base, "base", BASE),
        (self_trained, "self-trained", SELF_TRAINED),
    ):
        offset = (10, 6 if text == "data" else -14)
        chart.annotate(text, place, offset, textcoords="offset points", color=colour, fontsize=11)
    chart.set(xlim=(0.75, 2.05), ylim=(0.15, 1.45), aspect="equal")
    chart.set(xlabel="width along the data's long side", ylabel="width along its short side")
    chart.set_title("The same as a map")
    return figure


def strip(rows: Sequence[tuple[Study, str, Sequence[Stop]]]) -> Picture:
    """A row per study and sampler, a column per w: points of the same noise, line of the samples, line of the data."""
    columns = len(rows[0][2])
    figure = Picture(2.1 * columns, 2.55 * len(rows))
    for of_row, (study, sampler, stops) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        best = min(stops, key=lambda stop: stop.distance)
        for axes, stop in zip(of_row, stops, strict=True):
            colour = _colour(stop.w)
            axes.plot(*stop.points.numpy().T, ".", color=colour, alpha=0.3, ms=3)
            _ellipse(axes, DATA, INK, "data", ls=":")
            _ellipse(axes, stop.moments, colour, "samples")
            axes.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal", xticks=[], yticks=[])
            axes.set_title(f"w = {stop.w:g}" + {-1.0: ", self-trained", 0.0: ", base"}.get(stop.w, ""), fontsize=11)
            weight = "bold" if stop is best else "normal"
            axes.set_xlabel(f"distance {stop.distance:.3f}", fontsize=11, color=colour, weight=weight)
        of_row[0].set_ylabel(f"{study.toy.name}\n{sampler} ({study.toy.samplers[sampler]:g})", fontsize=11)
    return figure


def moving(stops: Sequence[Stop], seconds: float = 0.15) -> Moving:
    """Points of the same noise with their paths over w, beside the curve of distances; there and back again."""
    best = min(stops, key=lambda stop: stop.distance)
    paths = np.stack([stop.points.numpy() for stop in stops])  # [W, N, 2]
    ws, distances = [stop.w for stop in stops], [stop.distance for stop in stops]

    def at(stop: Stop) -> Picture:
        figure, colour = Picture(8.4, 4.2), _colour(stop.w)
        figure.set_layout_engine(None)  # which would move the axes with their labels
        figure.subplots_adjust(left=0.06, right=0.98, bottom=0.14, top=0.92, wspace=0.22)
        plane, curve = figure.subplots(1, 2)
        plane.plot(*paths.transpose(2, 0, 1), color=GREY, lw=0.5, alpha=0.35)
        _ellipse(plane, DATA, INK, "data", ls=":")
        _ellipse(plane, stop.moments, colour, "samples")
        plane.plot(*stop.points.numpy().T, "o", color=colour, ms=4)
        plane.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal", xlabel="x1", ylabel="x2")
        plane.set_title(f"w = {stop.w:+.1f}")
        curve.plot(ws, distances, color=INK, lw=1.2)
        curve.axvline(0, color=GREY, lw=0.8)
        curve.plot(stop.w, stop.distance, "o", color=colour, ms=11)
        curve.set(xlabel="w   (-1: self-trained, 0: base)", ylabel="distance to the data", ylim=(0, None))
        curve.set_title(f"distance {stop.distance:.3f}")
        return figure

    # From the best on, so that what shows one picture alone shows that.
    first = stops.index(best)
    order = [*stops[first:], *stops[-2:0:-1], *stops[:first]]
    pictures = {stop.w: at(stop) for stop in stops}
    return Moving([pictures[stop.w] for stop in order], seconds)


_STOPS = ((SELF_TRAINED, "self-trained"), (BASE, "base"), (NEON, "Neon"))


def _colour(w: float) -> str:
    return SELF_TRAINED if w < 0 else NEON if w > 0 else BASE


def _widths(statistics: Statistics) -> tuple[float, float]:
    """Standard deviations along the long and the short side of the data."""
    axes = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
    long, short = np.sqrt(np.diag(axes @ statistics.sigma @ axes.T))
    return float(long), float(short)


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
        axes.legend(loc="lower right", fontsize=8, frameon=False)
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
            axes.set_title(f"{study.toy.name}, {name} S")
            axes.legend(loc="lower right", fontsize=8, frameon=False)
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
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
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
                panel.plot(ratio, values, MARKERS[study.start], color=SAMPLERS[name], alpha=0.7, label=study.start)
        for panel, label in zip(axes, ("cosine of gradients", "best w"), strict=True):
            panel.axhline(0, color=GREY, lw=0.8)
            panel.axvline(1, color=GREY, lw=0.8, ls=":")
            panel.set(ylabel=label, ylim=(-1.3, 1.3))
        axes[0].set_title(f"{of_model[0].toy.name}, {name} S")
        axes[0].legend(title="base", fontsize=8)
        axes[1].set_xlabel("standard deviation of the base over that of the data")
    return figure


def _plane(axes: Axes, study: Study) -> None:
    points = study.example.points
    axes.plot(*points.numpy().T, ".", color=GREY, alpha=0.3, ms=4, label="points of the base")
    _ellipse(axes, DATA, INK, "data", ls=":")
    axes.set(xlim=(-4.5, 6.5), ylim=(-6.5, 4.5), aspect="equal")


def _ellipse(axes: Axes, statistics: Statistics, colour: str, label: str, ls: str = "-") -> None:
    """The line of two standard deviations."""
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    x, y = statistics.mu[:, None] + 2 * np.linalg.cholesky(statistics.sigma) @ circle
    axes.plot(x, y, ls, color=colour, lw=1.8, label=label)
