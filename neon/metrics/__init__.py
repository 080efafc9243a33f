"""Scores of images by their features: moments, Fréchet and kernel distance, Inception Score, precision and recall."""

from neon.metrics.frechet import DirectionTarget, FrechetReference, MomentTarget, frechet_distance
from neon.metrics.inception_score import InceptionScore
from neon.metrics.kernel import KernelScores, kernel_distance
from neon.metrics.manifold import Manifold, ManifoldScores
from neon.metrics.moments import Moments, Statistics, load_all_statistics, save_statistics

__all__ = [
    "DirectionTarget",
    "FrechetReference",
    "InceptionScore",
    "KernelScores",
    "Manifold",
    "ManifoldScores",
    "MomentTarget",
    "Moments",
    "Statistics",
    "frechet_distance",
    "kernel_distance",
    "load_all_statistics",
    "save_statistics",
]
