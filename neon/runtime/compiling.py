"""`--compile`: parts of a network by torch.compile, in place, so that weights keep their names.

Shapes are static: a part is compiled once for each shape of its inputs, and never again.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from neon.errors import RequestError, WorkError, one_line

BACKEND = "inductor"
"""of torch.compile; tests take one that needs no compiler of the system"""
MOST_SHAPES = 64
"""compilations of one function that are kept: of VAR's blocks one for each scale, with and without guidance"""


def compile_parts(parts: Iterable[nn.Module], *, repeated: bool = False) -> None:
    """Have each of `parts` compiled when it is called first, on the device that it is on then.

    If `repeated`, a part is all that is computed in a step which is repeated with equal shapes and no gradients: on a
    GPU its kernels are launched as one CUDA graph. Calling it raises a WorkError if torch cannot compile it.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    for part in parts:
        graphs = repeated and next(part.parameters()).is_cuda
        mode = "reduce-overhead" if graphs and BACKEND == "inductor" else None
        part.compile(backend=BACKEND, mode=mode, dynamic=False)
        compiled = part._compiled_call_impl
        assert compiled is not None
        part._compiled_call_impl = _Call(compiled, type(part).__name__, graphs=graphs)


class _Call:
    """A compiled part as it is called."""

    def __init__(self, compiled: Callable[..., Any], name: str, *, graphs: bool) -> None:
        self._compiled, self._name, self._graphs = compiled, name, graphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if not self._graphs:
                return self._compiled(*args, **kwargs)
            # What a graph returns lies where its next launch writes, and samplers keep some of it until then.
            torch.compiler.cudagraph_mark_step_begin()
            return tree_map_only(Tensor, Tensor.clone, self._compiled(*args, **kwargs))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise WorkError(
                f"--compile: torch cannot compile {self._name} here ({one_line(error)[:200]}); leave the flag out"
            ) from error


def check_compiler(device: torch.device) -> None:
    """Refuse `--compile` where there is no compiler for what torch generates: C++ for a CPU, for a GPU C and Triton.

    Raises:
        RequestError: one is missing.
    """
    if BACKEND != "inductor":
        return
    on_gpu = device.type == "cuda"
    if on_gpu and find_spec("triton") is None:
        raise RequestError("--compile: needs the package triton; install it, or leave the flag out")
    variable, language = ("CC", "C") if on_gpu else ("CXX", "C++")
    usual = ("gcc", "clang") if on_gpu else ("clang++",) if sys.platform == "darwin" else ("g++",)
    asked = os.environ.get(variable)
    tried = usual if asked is None else (asked,)
    if not any(shutil.which(name) for name in tried):
        raise RequestError(
            f"--compile: needs a {language} compiler, and there is no {' or '.join(tried)}; install one "
            f"(apt install g++), name it in {variable}, or leave the flag out"
        )
