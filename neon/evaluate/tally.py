"""What scores are made of, gathered image by image in one feature space, and the file that keeps it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from neon.checkpoint import open_checkpoint, save_safetensors
from neon.metrics import InceptionScore, Moments
from neon.metrics.features import FeatureExtractor
from neon.runtime.run_folder import STATE_VERSION, VERSION_KEY, check_version, reading_state

STATE_FILE = "evaluation.safetensors"
"""in the folder of a run: the evaluation in progress"""
INCEPTION_SCORE_SPLITS = 10
_BEGINS_ANEW = "delete it, and the evaluation that it is of begins anew"


class Tally:
    """What scores are made of, gathered image by image: moments, Inception Score sums and, if asked for, features.

    Memory does not grow with the number of images unless `keep_features` is set (precision, recall and the kernel
    distance need all of them).
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        num_images: int,
        *,
        keep_features: bool,
        device: torch.device,
        prompted: bool = False,
    ) -> None:
        """`prompted`: each image has a prompt, which `update` is told of."""
        self.extractor, self._num_images, self._device = extractor, num_images, device
        self.moments = Moments(extractor.dim, device=device)
        self.inception_score: InceptionScore | None = None
        self._keep_features = keep_features
        self._kept: Tensor | None = None  # float32 [num_images, F], of which the first are there
        self._fit: Tensor | None = None
        if prompted and extractor.reads_prompts:
            self._fit = torch.zeros((), dtype=torch.float64, device=device)
        scored = extractor.logits(torch.zeros(1, extractor.dim, device=device)) is not None
        if scored and num_images >= INCEPTION_SCORE_SPLITS:
            self.inception_score = InceptionScore(num_images, INCEPTION_SCORE_SPLITS, device=device)

    @property
    def done(self) -> int:
        """Images seen."""
        return self.moments.count

    @property
    def clip_score(self) -> float | None:
        """How well the images fit their prompts, on average; None: they have none, or the network reads none."""
        return None if self._fit is None else self._fit.item() / self.done

    def update(self, features: Tensor, prompts: Sequence[str] | None = None) -> None:
        """Add the features [B, F] of the next B images, which were drawn of `prompts`."""
        first = self.done
        self.moments.update(features)
        if self._keep_features:
            self._keep(first, features)
        if self.inception_score is not None:
            logits = self.extractor.logits(features)
            assert logits is not None
            self.inception_score.update(logits)
        if self._fit is not None and prompts is not None:
            self._fit += self.extractor.fit(features, prompts).double().sum()

    @property
    def features(self) -> Tensor:
        """The features kept, float32 [N, F]: no copy."""
        assert self._kept is not None, "features were not kept"
        return self._kept[: self.done]

    def _keep(self, first: int, features: Tensor) -> None:
        if self._kept is None:
            self._kept = torch.empty(self._num_images, self.extractor.dim, device=self._device)
        self._kept[first : first + len(features)] = features

    def state(self) -> dict[str, Tensor]:
        """All it takes to go on, on the CPU."""
        state = {f"moments.{key}": value for key, value in self.moments.state().items()}
        if self.inception_score is not None:
            state |= {f"inception_score.{key}": value for key, value in self.inception_score.state().items()}
        if self._fit is not None:
            state["fit"] = self._fit
        if self._kept is not None:
            state["features"] = self.features
        return {name: value.cpu() for name, value in state.items()}

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Become the tally of which `state` is; an exception of any kind if it is not of one like this."""
        moments = Moments.from_state(_below("moments", state), self._device)
        if len(moments.mean) != self.extractor.dim or not 0 < moments.count <= self._num_images:
            raise ValueError(f"{moments.count} images of {len(moments.mean)} features")
        if self.inception_score is not None:
            sums = _below("inception_score", state)
            if (int(sums["num_images"]), int(sums["seen"])) != (self._num_images, moments.count):
                raise ValueError(f"an Inception Score that has not seen {moments.count} images of {self._num_images}")
            self.inception_score = InceptionScore.from_state(sums, self._device)
        if self._keep_features:
            kept = state["features"]
            if kept.shape != (moments.count, self.extractor.dim):
                raise ValueError(f"features of shape {list(kept.shape)} of {moments.count} images")
            self._keep(0, kept)
        if self._fit is not None:
            self._fit = state["fit"].to(self._device)
        self.moments = moments


def save_tallies(path: Path, tallies: Sequence[Tally], seconds: float, identity: str) -> None:
    """Write all it takes to go on with an evaluation, atomically; `identity` says what the images are."""
    first, *others = tallies
    state = first.state()
    for number, tally in enumerate(others, 1):
        state |= {f"{number}.{name}": value for name, value in tally.state().items()}
    facts = {"identity": identity, "seconds": repr(seconds), VERSION_KEY: str(STATE_VERSION)}
    save_safetensors(path, state, facts)


def resume_tallies(path: Path, tallies: Sequence[Tally], identity: str) -> float:
    """Go on from the file `path`, if there is one of these images, to the same bits as never having stopped.

    Returns the seconds that it took to get there.

    Raises:
        RequestError: the file is damaged, or of a later version of neon.
    """
    if unfinished(path) != identity:
        return 0.0
    with reading_state(path, _BEGINS_ANEW):
        with open_checkpoint(path) as saved:
            state = {name: saved.tensor(name) for name in saved.names()}
            seconds = float(saved.metadata["seconds"])
        first, *others = tallies
        first.take_up(state)
        for number, tally in enumerate(others, 1):
            tally.take_up(_below(str(number), state))
            if tally.done != first.done:
                raise ValueError(f"{first.done} images in one feature space, {tally.done} in another")
    return seconds


def unfinished(path: Path) -> str | None:
    """The identity of the images whose evaluation was killed and left the file `path`; None: there is none.

    Raises:
        RequestError: the file is damaged, or of a later version of neon.
    """
    if not path.exists():
        return None
    with reading_state(path, _BEGINS_ANEW), open_checkpoint(path) as saved:
        identity, version = saved.metadata["identity"], saved.metadata.get(VERSION_KEY)
        number = None if version is None else int(version)
    check_version(path, number)
    return identity


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
