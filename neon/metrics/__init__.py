"""Scores of images by their features: moments, Fréchet distance, Inception Score, precision and recall."""

from neon.metrics.frechet import DirectionTarget, FrechetReference, MomentTarget, frechet_distance
from neon.metrics.inception_score import InceptionScore
from neon.metrics.manifold import Manifold, ManifoldScores
from neon.metrics.moments import Moments, Statistics

__all__ = [
    "DirectionTarget",
    "FrechetReference",
    "InceptionScore",
    "Manifold",
    "ManifoldScores",
    "MomentTarget",
    "Moments",
    "Statistics",
    "frechet_distance",
]
