"""A small real hunt: the smoke model on clips of one world, scored by a function of this file."""

from physnb.config import Guidance, HuntConfig
from physnb.data import simulate
from physnb.families import heads_of
from physnb.objectives import Objective, clip_judge
from physnb.subjects import ModelSubject
from physnb.trials import LocalExecutor, Trials

HUNT = HuntConfig(
    scenarios=("uniform",), split="id", selection_cases=3, confirmation_cases=2, top_k=2, steps=1, weight=3.0
)
ROUNDING = 1.0  # mean grey levels that a clip may move by in a batch of another size


def brightness(generated, true):
    """Mean grey level of a clip: any change of the weights or the guidance shows in it."""
    return generated.frames.float().mean((1, 2, 3, 4))


def subject_of(model, function=brightness, cases=3, version=1, **settings) -> ModelSubject:
    """The model on the first clips of one world, scored by a user's function."""
    clips = simulate("uniform", "id", range(cases), frames=8, size=16)
    objective = Objective(function.__name__, clip_judge(function, version))
    return ModelSubject(model, clips, objective, **dict(steps=1) | settings)


class Recorder(LocalExecutor):
    """Runs chunks in this process and remembers those that came back."""

    def __init__(self):
        self.chunks = []

    def run(self, subject, chunks):
        for number, outcome in super().run(subject, chunks):
            self.chunks.append(list(chunks[number]))
            yield number, outcome

    @property
    def rows(self):
        return [row for chunk in self.chunks for row in chunk]


def trials_of(subject, store=None, **settings) -> Trials:
    return Trials(subject, store, **dict(executor=Recorder(), progress=False) | settings)


def heads_alone(model) -> list[Guidance]:
    """The trials of every head by itself."""
    return [HUNT.guidance((head,)) for head in heads_of(model)]
