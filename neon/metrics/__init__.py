"""Scores of feature sets: moments, Fréchet distance, and precision/recall by nearest-neighbour manifolds."""

from neon.metrics.frechet import FrechetReference, frechet_distance
from neon.metrics.manifold import Manifold, ManifoldScores
from neon.metrics.moments import Moments, Statistics

__all__ = ["FrechetReference", "Manifold", "ManifoldScores", "Moments", "Statistics", "frechet_distance"]
