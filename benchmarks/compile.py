"""What `--compile` is worth on a CPU: sampling and self-training of the demo's model, with it and without, in turn.

    python benchmarks/compile.py

One thread; processor time of this process, which other programs on the machine move least. Compilation, by the system's
C++ compiler in processes of its own, is told in seconds of the clock. `equal_images` is the share of pixels that stay.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine

from neon.data.images import ArrayDataset
from neon.demo.assets import BASE, real_images
from neon.model import GenerativeModel, load_model
from neon.runtime.distributed import Processes
from neon.runtime.files import write_json
from neon.sampling import sample_block
from neon.selftrain import TrainingRun

SAMPLED, TRAINED = 50, 32
"""images of a batch"""


def sampler(model: GenerativeModel) -> Callable[[], torch.Tensor]:
    """A batch of images in five Euler steps."""
    settings = replace(model.default_settings, num_steps=5, solver="euler")
    return lambda: sample_block(model, range(SAMPLED), range(SAMPLED), settings, Processes())[0]


def trainer(model: GenerativeModel, folder: Path) -> Callable[[], object]:
    """A step of self-training on real images, whose classes are made up."""
    recipe = replace(model.recipe, batch_size=TRAINED)
    images = real_images()
    data = ArrayDataset(images, torch.arange(len(images)) % model.num_classes, Path("images"))
    return TrainingRun(model, data, folder, recipe, seed=0, processes=Processes(), micro_batch=TRAINED).one_step


def in_turn(eager: Callable[[], object], compiled: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Median seconds of the processor for both."""
    start = time.perf_counter()
    compiled()
    compilation = time.perf_counter() - start
    eager()
    seconds: dict[str, list[float]] = {"eager_s": [], "compiled_s": []}
    for _ in range(repeats):
        for name, program in zip(seconds, (eager, compiled), strict=True):
            start = time.process_time()
            program()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        **medians,
        "times_as_fast": medians["eager_s"] / medians["compiled_s"],
        "compilation_s": compilation - medians["compiled_s"],
    }


def main(repeats: int = 7, json_file: Path = Path(__file__).parent / "results" / "compile_cpu.json") -> None:
    """Measure.

    Args:
        repeats: of each, in turn.
        json_file: the record.
    """
    torch.set_num_threads(1)
    here = machine()
    eager, compiled = load_model(BASE), load_model(BASE)
    compiled.compile_parts()
    draw, draw_compiled = sampler(eager), sampler(compiled)
    sampling = in_turn(draw, draw_compiled, repeats)
    sampling["equal_images"] = (draw() == draw_compiled()).double().mean().item()
    with tempfile.TemporaryDirectory() as folder:
        models = [load_model(BASE, for_training=True) for _ in range(2)]
        models[1].compile_training()
        step, compiled_step = (trainer(model, Path(folder)) for model in models)
        training = in_turn(step, compiled_step, repeats)
    size = sum(parameter.numel() for parameter in eager.network.parameters())
    record = {"command": " ".join(["python", *sys.argv]), "machine": here, "parameters": size}
    write_json(json_file, {**record, "sampling": sampling, "training": training})
    for name, found in (("sampling", sampling), ("training", training)):
        print(name, ", ".join(f"{key} {value:.4g}" for key, value in found.items()))


if __name__ == "__main__":
    tyro.cli(main)
