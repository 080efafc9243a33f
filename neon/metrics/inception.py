"""Inception's 2,048 features and class logits, of which FID and the Inception Score are made.

The network is torch-fidelity's `inception-v3-compat`: the weights of TensorFlow's inception-2015-12-05 and what that
graph does, resizing to 299 x 299 in the manner of TensorFlow 1 included unless another mode is asked for.
"""

import io
import shlex
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neon.checkpoint import load_state
from neon.errors import RequestError
from neon.metrics.networks import PublishedNetwork, full_float32
from neon.metrics.resizing import RESIZERS

SIDE = 299
USUAL = "legacy_tensorflow"


class InceptionFeatures(PublishedNetwork):
    """The network of the FID; `load` makes one."""

    name = "inception"
    dim = 2048
    score_name = "fid"
    modes = tuple(RESIZERS)
    # 16 MB each. On one CPU thread, 8 to 32 take 0.09 s an image, 64 take 0.12.
    chunk = 32

    def __init__(self, network: Any, resize: str | None = None) -> None:
        """Wrap torch-fidelity's network, asked for the features `2048`."""
        # Two fifths faster on a CPU (0.084 s against 0.118 s an image, one thread), equal to 3e-6.
        self._network = network.to(memory_format=torch.channels_last)
        self._resize = RESIZERS[resize or USUAL]
        self.any_size = resize is not None
        if resize not in (None, USUAL):
            self.protocol = {"resize": resize}

    @property
    def identity(self) -> str:
        return ":".join([self.name, *self.protocol.values()])

    def resized(self, images: Tensor) -> Tensor:
        return self._resize(images, SIDE)

    def features(self, images: Tensor) -> Tensor:
        # The network's own forward resizes, always; its blocks are its children, in the order in which they are used.
        *blocks, _ = self._network.children()
        hidden = (images - 128) / 128
        for block in blocks:
            hidden = block(hidden)
        return hidden.flatten(1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """float32 [B, 2048] -> class logits without bias, float32 [B, 1008] (torch-fidelity's `logits_unbiased`)."""
        with full_float32():
            return features @ self._network.fc.weight.T

    @classmethod
    def weights_file(cls, named: Path | None = None) -> Path:
        """`named`, or where torch-fidelity caches its own."""
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        return Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name) if named is None else named

    @classmethod
    def load(
        cls, weights: Path | None = None, device: torch.device = torch.device("cpu"), resize: str | None = None
    ) -> "InceptionFeatures":
        # Imports torchvision: 1.7 s that only those who use this network pay.
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        path = cls.weights_file(weights)
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
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=state
            )  # fmt: skip
        except RuntimeError as error:  # from load_state_dict: a heading, then a line for each kind of misfit
            misfits = "; ".join(
                textwrap.shorten(line, 120, placeholder=" ...") for line in str(error).splitlines()[1:3]
            )  # fmt: skip
            raise RequestError(
                f"{path}: these weights are not those of torch-fidelity's Inception network ({misfits}); "
                f"fetch them with {fetch}"
            ) from error
        return cls(network.to(device), resize)
