"""What a user should know before believing a choice, as sentences: nothing here prints or refuses."""

import numpy as np

from neon.evaluate import FEW_IMAGES
from neon.metrics import Statistics
from neon.metrics.frechet import frechet_distance
from neon.model import GenerativeModel

# The demo's w chosen against 2,000 test images that were made noisy, darker or brighter: how far these are from all
# test images beyond what sizes explain, as a share of the gain, and how far the choice's distance to the latter is
# above the lowest: 0.13 3%, 0.29 0.4%, 0.36 1%, 0.46 1%, 0.53 29%, 0.87 89%.
FAR_REFERENCES = 0.25
"""share of the gain from which on a distance between references counts"""
FEW_OF_A_CLASS = 10
"""below it the number of images of a class, where they are drawn, scatters by more than a third of itself"""


def reference_cautions(selection: Statistics, reporting: Statistics, gain: float) -> list[str]:
    """Why a choice against `selection` may be off for `reporting`, where distances fell by `gain`; usually nothing."""
    cautions = []
    distance = frechet_distance(selection, reporting)
    sizes = explained_by_sizes(selection, reporting)
    if gain > 0 and distance - sizes > FAR_REFERENCES * gain:
        cautions.append(
            f"the references of selection and report ({selection.name}, {reporting.name}) are {distance:.3g} apart"
            + (f", of which their numbers of images explain {sizes:.2g}" if sizes else "")
            + f", and the gain is {gain:.3g}: the choice may be off for the report; take both from one kind of images"
        )
    if selection.count is not None and selection.count < FEW_IMAGES * selection.dim:
        cautions.append(
            f"the choice was made against {selection.name}, of {selection.count:,} images for {selection.dim:,} "
            f"features: for other images it may be off; use {FEW_IMAGES * selection.dim:,} or more, or fewer features"
        )
    return cautions


def explained_by_sizes(a: Statistics, b: Statistics) -> float:
    """The Fréchet distance that two samples of one distribution have on average; 0 where a count is not known.

    Of means it is (1/n + 1/m) tr S. Of covariances, to second order in their difference E, it is the sum over pairs of
    eigenvalues of E_ij² / (2 (l_i + l_j)) in the eigenbasis of S, where E_ij² is (1/n + 1/m) l_i l_j on average, twice
    that for i = j: of normally distributed features.
    """
    if a.count is None or b.count is None:
        return 0.0
    values = np.linalg.eigvalsh((a.count * a.sigma + b.count * b.sigma) / (a.count + b.count))
    values = values[values > values.max() * values.size * np.finfo(np.float64).eps]
    pairs = values[:, None] * values / (values[:, None] + values)
    return float((1 / a.count + 1 / b.count) * (values.sum() + (pairs.sum() + np.trace(pairs)) / 2))


def balance_cautions(model: GenerativeModel, num_images: int) -> list[str]:
    """How the classes in report sets of `num_images` images differ from equal shares; usually nothing."""
    classes = model.num_classes
    if not classes or model.prompts is not None:  # of prompts there may be more than images
        return []
    if model.set_labels(num_images, 0) is None:
        if num_images >= FEW_OF_A_CLASS * classes:
            return []
        return [
            f"each image draws its class, and {num_images:,} images are {num_images / classes:.2g} of each of "
            f"{classes:,} classes on average: sets differ by their classes; use {FEW_OF_A_CLASS * classes:,} images or "
            "more"
        ]
    if num_images >= classes:
        return []
    return [
        f"{num_images:,} images are fewer than the {classes:,} classes, so some have none in a set; use {classes:,} "
        "images, or a multiple"
    ]
