"""Inception Score: how sure a classifier is of each image, and how many classes the images cover.

With p the class probabilities of an image and q their mean over the images of a split, a split scores

    exp(mean of KL(p | q)) = exp(mean of Σ p log p  -  Σ q log q),

and the score is mean and standard deviation over the splits (Salimans et al. 2016). The right side needs sums
only. Shuffling and cuts are torch-fidelity's: images go to splits by `RandomState(seed).permutation(N)`.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from neon.errors import DegenerateError, RequestError

NUM_CLASSES = 1008
"""outputs of the TensorFlow network, 1,000 of which are ImageNet's classes"""


class InceptionScore:
    """Sums over the splits of `num_images` images, in float64 on `device`.

    Memory is that of the sums, and one integer per image that tells its split. How the images are cut into blocks
    changes the score by float64 rounding only.
    """

    def __init__(self, num_images: int, splits: int = 10, seed: int = 2020, device: torch.device | str = "cpu") -> None:
        """Deal out the images to the splits.

        Raises:
            RequestError: fewer images than splits.
        """
        if num_images < splits:
            raise RequestError(
                f"an Inception Score of {splits} splits needs at least {splits} images, found {num_images}; "
                "use more images"
            )
        self._num_images, self._splits, self._seed = num_images, splits, seed
        self._seen = 0
        self._sizes = np.diff(np.arange(splits + 1) * num_images // splits)  # [S]
        split_of = np.empty(num_images, dtype=np.int64)
        split_of[np.random.RandomState(seed).permutation(num_images)] = np.repeat(np.arange(splits), self._sizes)
        self._split_of = torch.from_numpy(split_of).to(device)  # [N]
        self._probabilities = torch.zeros(splits, NUM_CLASSES, dtype=torch.float64, device=device)  # sums of p
        self._negentropy = torch.zeros(splits, dtype=torch.float64, device=device)  # sums of Σ p log p

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Add the next images, in their order: logits [B, 1008] of any float dtype, from any device.

        Raises:
            RequestError: not floats of that shape, or more images than were announced.
        """
        if logits.ndim != 2 or logits.shape[1] != NUM_CLASSES or not logits.is_floating_point():
            found = f"{logits.dtype} {list(logits.shape)}"
            raise RequestError(f"logits must be floats of shape [B, {NUM_CLASSES}], found {found}")
        end = self._seen + len(logits)
        if end > self._num_images:
            raise RequestError(f"an Inception Score of {self._num_images} images was given {end}")
        log_p = logits.to(self._probabilities.device, torch.float64).log_softmax(1)
        p = log_p.exp()
        # Products with the membership, not index_add_: that one sums in any order on a GPU.
        members = F.one_hot(self._split_of[self._seen : end], self._splits).to(torch.float64).T  # [S, B]
        self._probabilities += members @ p
        self._negentropy += members @ (p * log_p).sum(1)
        self._seen = end

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits, each between 1 and 1008.

        Raises:
            RequestError: some of the images were not seen yet.
            DegenerateError: a logit was not finite.
        """
        if self._seen != self._num_images:
            raise RequestError(f"an Inception Score of {self._num_images} images has seen {self._seen} of them so far")
        sizes = torch.from_numpy(self._sizes).to(self._negentropy.device)
        q = self._probabilities / sizes[:, None]
        scores = (self._negentropy / sizes - torch.special.xlogy(q, q).sum(1)).exp().cpu().numpy()
        if not np.isfinite(scores).all():
            raise DegenerateError(f"some of the class logits of {self._num_images} images are not finite")
        return float(scores.mean()), float(scores.std())

    def state(self) -> dict[str, Tensor]:
        """A copy of all it takes to go on later.

        `num_images`, `seed` and `seen` int64 [], `probabilities` float64 [S, 1008], `negentropy` float64 [S].
        """
        numbers = {"num_images": self._num_images, "seed": self._seed, "seen": self._seen}
        return {
            **{name: torch.tensor(number, dtype=torch.int64) for name, number in numbers.items()},
            "probabilities": self._probabilities.clone(),
            "negentropy": self._negentropy.clone(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> "InceptionScore":
        """The sums that `state()` described; going on from them gives the same bits as never having stopped.

        Raises:
            RequestError: an entry is missing, or has another dtype or shape than `state()` writes.
        """
        names = ("num_images", "seed", "seen", "probabilities", "negentropy")
        missing = set(names) - state.keys()
        if missing:
            raise RequestError(f"a saved Inception Score lacks {sorted(missing)}, found {sorted(state)}")
        layout = [(state[name].dtype, tuple(state[name].shape)) for name in names]
        splits = state["negentropy"].numel()
        number, sums = (torch.int64, ()), torch.float64
        if layout != [number, number, number, (sums, (splits, NUM_CLASSES)), (sums, (splits,))]:
            raise RequestError(
                f"a saved Inception Score must be num_images, seed, seen int64 [], probabilities float64 "
                f"[S, {NUM_CLASSES}], negentropy float64 [S], found {layout}"
            )
        restored = cls(int(state["num_images"]), splits, int(state["seed"]), device)
        restored._seen = int(state["seen"])
        restored._probabilities.copy_(state["probabilities"])
        restored._negentropy.copy_(state["negentropy"])
        return restored
