"""Looking at the features of a run, in notebooks and for the site of experiments.features."""

from evals.explore.explorer import Explorer
from evals.explore.find import find_features
from evals.explore.similarity import feature_similarity

__all__ = ["Explorer", "feature_similarity", "find_features"]
