"""physnb: which attention heads of a video diffusion transformer carry physics?

The way of the data: `data` (simulate) -> `train` -> `generate` -> `metrics` (measure) -> `search` (hunt, strengthen)
-> `analysis` -> `results` and `runs` (report). Import what you need from these modules; only light names are here.
"""

from physnb.config import (
    Guidance,
    HeadId,
    HuntConfig,
    ModelConfig,
    Perturbation,
    TrainConfig,
    head_set,
    preset,
)

__all__ = [
    "Guidance",
    "HeadId",
    "HuntConfig",
    "ModelConfig",
    "Perturbation",
    "TrainConfig",
    "head_set",
    "preset",
]
