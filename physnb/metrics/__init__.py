"""Judges: metric(generated, true) -> per-clip Scores."""

from physnb.metrics.scores import Scores
from physnb.metrics.trajectory import metric_trajectory, parse_discs

__all__ = ["Scores", "metric_trajectory", "parse_discs"]
