"""Inception's 2,048 features and class logits, of which FID and the Inception Score are made.

The network is torch-fidelity's `inception-v3-compat`: the weights of TensorFlow's inception-2015-12-05 and what that
graph does, resizing to 299 x 299 in the manner of TensorFlow 1 included.
"""

import contextlib
import io
import os
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon.checkpoint import load_state
from neon.errors import RequestError

# Images that go through the network at once: 16 MB each. On one CPU thread, 8 to 32 take 0.09 s an image, 64 take 0.12.
CHUNK = 32


class InceptionFeatures:
    """The network of the FID; `load_inception` makes one."""

    name = "inception"
    dim = 2048

    def __init__(self, network: Any) -> None:
        """Wrap torch-fidelity's network, asked for the features `2048`."""
        # Two fifths faster on a CPU (0.084 s against 0.118 s an image, one thread), equal to 3e-6.
        self._network = network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] with C 1 or 3 -> float32 [B, 2048], all at least 0; row b depends on image b only.

        Grey is repeated to three channels; any H and W.

        Raises:
            RequestError: another dtype or number of channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = f"{images.dtype} {list(images.shape)}"
            raise RequestError(f"Inception features need uint8 images [B, 1 or 3, H, W], found {found}")
        with _full_float32():
            return torch.cat([self._network(chunk.expand(-1, 3, -1, -1))[0] for chunk in images.split(CHUNK)])

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """float32 [B, 2048] -> class logits without bias, float32 [B, 1008] (torch-fidelity's `logits_unbiased`)."""
        with _full_float32():
            return features @ self._network.fc.weight.T


def weights_file(weights: str | os.PathLike[str] | None = None) -> Path:
    """Where the weights of the network lie: in the file `weights`, or where torch-fidelity caches its own."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name) if weights is None else Path(weights)


def load_inception(
    weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
) -> InceptionFeatures:
    """The network with the weights of a file, or with torch-fidelity's own where that package caches them.

    Nothing is downloaded, and nothing that a file contains is executed.

    Raises:
        RequestError: there is no such file (the message says how to fetch it), or it holds something else.
    """
    # Imports torchvision: 1.7 s that only those who use this network pay.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = weights_file(weights)
    fetch = f"`curl -L --create-dirs -o {shlex.quote(str(path))} {URL_INCEPTION_V3}`"
    if not path.exists():
        raise RequestError(
            f"{path}: no such file; Inception features need these weights (95 MB): fetch them once with {fetch}, "
            "or name your copy with --inception_weights FILE"
        )
    # torch-fidelity unpickles the file it is given, whatever is in it; so it is given tensors read safely.
    state = io.BytesIO()
    torch.save(load_state(path), state)
    state.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=state)
    except RuntimeError as error:  # from load_state_dict: a heading, then a line for each kind of misfit
        misfits = "; ".join(textwrap.shorten(line, 120, placeholder=" ...") for line in str(error).splitlines()[1:3])
        raise RequestError(
            f"{path}: these weights are not those of torch-fidelity's Inception network ({misfits}); "
            f"fetch them with {fetch}"
        ) from error
    return InceptionFeatures(network.to(device))


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """float32 without shortcuts (TF32, bfloat16) inside; what the program chose is in force again outside."""
    backends: Any = torch.backends
    operations = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul]
    chosen = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, chosen, strict=True):
            operation.fp32_precision = precision
