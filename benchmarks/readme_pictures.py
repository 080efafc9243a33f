"""The two pictures that README opens with: `make demo && python benchmarks/readme_pictures.py`.

docs/neon-strip.webp moves w from the self-trained model (-1) over the base (0) and Neon beyond it, and back;
docs/neon-samples.webp shows self-trained model, base and Neon in a row each, above real images. Both are of the demo's
networks and its sampler of 5 Euler steps, on the noise of seed 0, the same in every row and frame, and not picked.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

import neon
from neon.demo.assets import BASE, real_images
from neon.demo.run import NUM_STEPS

ROOT = Path(__file__).parent.parent
WIDTH = 830
"""pixels of a README's column"""
FINE = 2
"""pixels of a picture to each of these, for screens that have as many"""
MARGIN, GAP = 20, 10
PAPER, INK, FAINT, MARK = "#0d1117", "#e6edf3", "#9198a1", "#f0b429"
CLASSES = 10
REAL = {0: 19, 2: 1, 5: 8, 6: 4, 8: 18, 9: 0}
"""classes of the still picture, with the first test image of each"""
BEYOND = 1.5
"""the w at which the strip turns: where the demo's search ends, too"""
STEP = 0.1
STILL_MS, MOVING_MS = 1300, 80
"""how long a frame stays, in ms: at one of the marks, and between them"""

Samples = dict[float, np.ndarray]
"""by w: uint8 [rows * CLASSES, H, W], a class in each column"""


def samples(run: Path, ws: Sequence[float], rows: int) -> Samples:
    """What the demo's base, extrapolated by each w, draws on the same noise: of each class `rows` images."""
    base = neon.load(BASE, device="cpu").with_settings(solver="euler", num_steps=NUM_STEPS)
    [snapshot] = (run / "self-training").glob("snapshot-*.safetensors")
    labels = list(range(CLASSES)) * rows
    return {w: neon.extrapolate(base, snapshot, w=w).sample(len(labels), label=labels)[:, 0].cpu().numpy() for w in ws}


def path_of_w(best: float) -> list[tuple[float, int]]:
    """Every w of the strip with the ms that it stays, once there and back."""
    stops = [-1.0, 0.0, best, BEYOND]
    there: list[tuple[float, int]] = []
    for start, end in pairwise(stops):
        between = np.linspace(start, end, max(round((end - start) / STEP), 1) + 1)[1:-1]
        there += [(start, STILL_MS), *((round(float(w), 3), MOVING_MS) for w in between)]
    there.append((BEYOND, STILL_MS))
    return there + there[-2:0:-1]


def name_of(w: float, best: float) -> str:
    """What the weights of the strip are called at w."""
    names = {-1.0: "self-trained", 0.0: "base", best: "Neon", BEYOND: "too far"}
    return names.get(w, "")


def in_words(w: str) -> str:
    return f"w = {w}".replace("-", "\N{MINUS SIGN}")


class Sheet:
    """A picture that is drawn on in the pixels of a README's column."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * FINE, height * FINE), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def paste(self, picture: np.ndarray, left: float, top: float, size: int) -> None:
        """A square picture, enlarged gently: as squares of grey, 14 x 14 pixels are hard to read."""
        large = Image.fromarray(picture).resize((size * FINE, size * FINE), Image.Resampling.BICUBIC)
        self.image.paste(large.convert("RGB"), (round(left * FINE), round(top * FINE)))

    def write(self, text: str, x: float, y: float, *, size: int, ink: str = INK, anchor: str = "lm") -> None:
        """Text about the point that `anchor` says, by Pillow's letters."""
        font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        self._draw.text((x * FINE, y * FINE), text, ink, ImageFont.truetype(font, size * FINE), anchor)

    def line(self, x0: float, y0: float, x1: float, y1: float, *, ink: str) -> None:
        self._draw.line((x0 * FINE, y0 * FINE, x1 * FINE, y1 * FINE), ink, 3 * FINE)

    def dot(self, x: float, y: float, radius: float) -> None:
        self._draw.circle((x * FINE, y * FINE), radius * FINE, MARK)


def strip(shown: Samples, w: float, best: float) -> Image.Image:
    """One frame: a row of images for each noise, a class in each column, and below them where w stands."""
    size = (WIDTH - 2 * MARGIN - (CLASSES - 1) * GAP) // CLASSES
    rows = len(shown[w]) // CLASSES
    scale = MARGIN + rows * (size + GAP) + 30
    sheet = Sheet(scale + 50)
    for index, picture in enumerate(shown[w]):
        row, column = divmod(index, CLASSES)
        sheet.paste(picture, MARGIN + column * (size + GAP), MARGIN + row * (size + GAP), size)
    start, end = MARGIN + 180, WIDTH - MARGIN - 50

    def place(value: float) -> float:
        return start + (value + 1) / (BEYOND + 1) * (end - start)

    sheet.write(in_words(f"{w:.2f}"), MARGIN, scale, size=24)
    sheet.line(start, scale, end, scale, ink=FAINT)
    for mark in (-1.0, 0.0, best, BEYOND):
        sheet.line(place(mark), scale - 7, place(mark), scale + 7, ink=FAINT)
        here = abs(mark - w) < 1e-9
        sheet.write(name_of(mark, best), place(mark), scale + 30, size=22, ink=INK if here else FAINT, anchor="mm")
    sheet.dot(place(w), scale, 11)
    return sheet.image


def still(shown: Samples, best: float) -> Image.Image:
    """Self-trained model, base and Neon, a row each of the same noise; below them real images."""
    size = 98
    left = WIDTH - MARGIN - len(REAL) * (size + GAP) + GAP
    rows = [(name_of(w, best), in_words(f"{w:g}"), shown[w][list(REAL)]) for w in (-1.0, 0.0, best)]
    rows.append(("real", "test images", real_images()[list(REAL.values()), 0].numpy()))
    sheet = Sheet(2 * MARGIN + len(rows) * (size + GAP) - GAP)
    for row, (name, note, pictures) in enumerate(rows):
        top = MARGIN + row * (size + GAP)
        sheet.write(name, MARGIN, top + size / 2 - 15, size=22)
        sheet.write(note, MARGIN, top + size / 2 + 15, size=20, ink=FAINT)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, left + column * (size + GAP), top, size)
    return sheet.image


def main(run: Path = ROOT / "runs" / "demo", out: Path = ROOT / "docs") -> None:
    """Make both pictures.

    Args:
        run: The folder of a finished `neon demo`.
        out: Where they go.
    """
    if not (run / "scores.json").exists():
        raise SystemExit(f"{run}: no finished run of the demo; `neon demo --out {run}` makes one")
    best = json.loads((run / "scores.json").read_text())["rows"]["neon"]["w"]
    frames = path_of_w(best)
    shown = samples(run, sorted({w for w, _ in frames}), rows=2)
    still(shown, best).save(out / "neon-samples.webp", quality=85, method=6)
    first, *others = [strip(shown, w, best) for w, _ in frames]
    first.save(
        out / "neon-strip.webp",
        save_all=True,
        append_images=others,
        duration=[ms for _, ms in frames],
        loop=0,
        quality=50,
        method=4,
    )
    for name in ("neon-samples.webp", "neon-strip.webp"):
        print(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    tyro.cli(main)
