"""From a model, or from images, to scores: features block by block, compared with real images."""

from neon.evaluate.features import features_in_order, sampled_images, stored_images, tally_images
from neon.evaluate.reference import (
    FEW_IMAGES,
    RealFeatures,
    Reference,
    are_few,
    is_statistics,
    real_features,
    references_at,
    scores_in,
    side_by_side,
    warn_of_few,
)
from neon.evaluate.run import SAVE_EVERY_SECONDS, evaluate
from neon.evaluate.scores import LOG_FILE, SHARES, ScoreLog, Scores, scores_from, scores_json
from neon.evaluate.tally import STATE_FILE, Tally, resume_tallies, save_tallies, unfinished

__all__ = [
    "FEW_IMAGES",
    "LOG_FILE",
    "SAVE_EVERY_SECONDS",
    "SHARES",
    "STATE_FILE",
    "RealFeatures",
    "Reference",
    "ScoreLog",
    "Scores",
    "Tally",
    "are_few",
    "evaluate",
    "features_in_order",
    "is_statistics",
    "real_features",
    "references_at",
    "resume_tallies",
    "sampled_images",
    "save_tallies",
    "scores_from",
    "scores_in",
    "scores_json",
    "side_by_side",
    "stored_images",
    "tally_images",
    "unfinished",
    "warn_of_few",
]
