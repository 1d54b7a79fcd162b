"""Mixtures of sources: reproducible, resumable, in proportion, and every clip of a finite source once an epoch."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from physnb.config import SCENARIOS
from physnb.data import Clip, Mixture, SimulatedSource
from physnb.data.sources import BLOCK, shuffled


@dataclass(frozen=True)
class Numbered:
    """Clips whose only content is their number."""

    name: str
    count: int | None
    captions: tuple[str, ...] = ("a number",)

    def clips(self, numbers):
        assert self.count is None or (0 <= numbers.min() and numbers.max() < self.count)
        frames = torch.zeros(len(numbers), 2, 1, 1, 3, dtype=torch.uint8)
        names = (self.name,) * len(numbers)
        return Clip(frames, ("",) * len(numbers), names, ("id",) * len(numbers), torch.as_tensor(numbers))


def told(clip: Clip) -> list[tuple[str, int]]:
    return list(zip(clip.scenarios, clip.indices.tolist(), strict=True))


MIXED = Mixture((Numbered("small", 7), Numbered("endless", None), Numbered("large", 1000)), (1.0, 2.0, 1.0), seed=3)


def test_any_example_alone_is_the_example_of_the_stream():
    stream = told(MIXED.examples(range(300)))
    fresh = Mixture(MIXED.sources, MIXED.weights, seed=3)
    for number in (299, 0, 57, 118):
        assert told(fresh.examples([number])) == [stream[number]]
    assert told(fresh.examples([5, 5, 2])) == [stream[5], stream[5], stream[2]]


def test_a_stream_goes_on_in_the_middle_of_an_epoch():
    whole = told(MIXED.examples(range(2 * BLOCK)))
    later = Mixture(MIXED.sources, MIXED.weights, seed=3)
    assert told(later.examples(range(BLOCK + 100, BLOCK + 140))) == whole[BLOCK + 100 : BLOCK + 140]


def test_every_epoch_shows_each_clip_once_in_an_order_of_its_own():
    shown = [number for name, number in told(MIXED.examples(range(400))) if name == "small"]
    epochs = [tuple(shown[i : i + 7]) for i in range(0, len(shown) - 7, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(epochs)) > len(epochs) // 2


def test_endless_sources_give_the_clip_of_the_examples_number():
    for number, (name, shown) in enumerate(told(MIXED.examples(range(100)))):
        assert name != "endless" or shown == number


def test_sources_come_in_their_proportions():
    count = Counter(name for name, _ in told(MIXED.examples(range(4000))))
    shares = [count[source.name] / 4000 for source in MIXED.sources]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=4 * np.sqrt(0.25 / 4000))


def test_seeds_give_other_streams_and_orders():
    other = Mixture(MIXED.sources, MIXED.weights, seed=4)
    assert told(other.examples(range(50))) != told(MIXED.examples(range(50)))
    assert sorted(shuffled(0, "a", 0, 50)) == list(range(50))
    orders = {tuple(shuffled(*key, 50)) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))}
    assert len(orders) == 4


def test_simulated_clips_of_a_mixture_are_the_same_in_any_batch():
    sources = tuple(SimulatedSource(name, frames=4, size=8, seed=5) for name in (*SCENARIOS, "orbit"))
    mixture = Mixture(sources, (1.0, 1.0, 2.0, 1.0), seed=5)
    batch = mixture.examples(range(24))
    assert len(set(batch.scenarios)) == 4
    for number in (0, 11, 23):
        alone = mixture.examples([number])
        assert torch.equal(alone.frames[0], batch.frames[number]) and alone.captions[0] == batch.captions[number]
        assert alone.parameters[0] == batch.parameters[number]


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ((), (), "at least one source"),
        ((Numbered("a", 1), Numbered("a", 2)), (1.0, 1.0), "must differ, got a, a"),
        ((Numbered("a", 1),), (0.0,), "a positive weight to each of a"),
        ((Numbered("a", 1),), (1.0, 1.0), "a positive weight to each of a"),
        ((Numbered("a", 0),), (1.0,), "no clip in a"),
    ],
)
def test_bad_mixtures_are_named(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sources, weights)


def test_negative_examples_are_refused():
    with pytest.raises(ValueError, match="not be negative"):
        MIXED.examples([-1])
