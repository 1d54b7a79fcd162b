"""Judges: metric(generated, true) -> per-clip Scores, or one SetScore for two sets of clips.

    trajectory, trajectory_compat    the true motion of simulated discs; phyworld's own evaluator
    physics_iq, physics_iq_files     where, when and how much moves, against two takes; folders of anyone's videos
    frechet, features, i3d           distances between sets of clips
    question_making                  four-choice questions about a clip, answered by its discs
    questions, judges                PhysBench and WM-ABench forms, vision-language judges of them
    violations, preference           broken laws seen without the truth; a reward learnt from choices; Bradley-Terry
    pickscore                        whether frames fit a prompt

Those that need large libraries are imported by name. `physnb.likelihood` judges models rather than clips, and
`physnb.ladder` judges the judges.
"""

from physnb.metrics.scores import Scores
from physnb.metrics.trajectory import bucket_table, metric_trajectory, parse_discs

__all__ = ["Scores", "bucket_table", "metric_trajectory", "parse_discs"]
