"""Captions: levels that add up, paraphrases that vary, and a closed vocabulary that holds them all."""

import pytest
import torch

from physnb.config import CAPTION_LEVELS, FLUIDS, SCENARIOS, SIMULATED
from physnb.data import CAPTIONS, Clip, encode_captions, simulate, vocabulary_of, write_captions
from physnb.data.captions import KNOWLEDGE, NUMBER_WORDS, number_word, words_of
from physnb.data.catalogue import words_of_sources
from physnb.data.simulators import SimulatedSource

CLIPS = {name: simulate(name, "ood", range(40), frames=2, size=8) for name in SIMULATED}
each = pytest.mark.parametrize("scenario", SIMULATED)


def test_every_scenario_is_known():
    assert tuple(KNOWLEDGE) == (*SIMULATED, *FLUIDS) == tuple(CAPTIONS)


@each
def test_levels_add_up(scenario):
    clip = CLIPS[scenario]
    said = {level: write_captions(clip, level) for level in CAPTION_LEVELS}
    assert set(said["none"]) == {""} and set(said["label"]) == {scenario}
    for description, parameters, law in zip(said["description"], said["parameters"], said["law"], strict=True):
        assert law.startswith(parameters + ", ") and parameters.startswith(description + ", ")
        assert law.endswith(KNOWLEDGE[scenario].laws[0])
    assert len(set(said["parameters"])) > 20  # the numbers are those of each clip
    assert said["augmented"] == said["law"]  # without a seed


@each
@pytest.mark.parametrize("level", CAPTION_LEVELS)
def test_the_vocabulary_holds_every_caption(scenario, level):
    captions = write_captions(CLIPS[scenario], level, seed=1)
    ids = encode_captions(captions, vocabulary_of((scenario,), level))
    assert ((ids > 0).sum(1) == torch.tensor([len(words_of(caption)) for caption in captions])).all()


def test_paraphrases_vary_and_are_functions_of_seed_and_index():
    clip = simulate("orbit", "train", range(500), frames=2, size=8)
    said = write_captions(clip, "augmented", seed=0)
    assert len(set(said)) > 150 and "" not in said
    assert write_captions(clip[7:9], "augmented", seed=0) == said[7:9]
    assert write_captions(clip, "augmented", seed=1) != said
    laws = [text for text in said if any(law in text for law in KNOWLEDGE["orbit"].laws)]
    assert 0.35 < len(laws) / 500 < 0.52  # seven eighths of a half
    orders = {text.startswith("the pull") for text in said if "the pull" in text and "circles" in text}
    assert orders == {True, False}


def test_the_numbers_in_a_caption_are_those_of_the_clip():
    clip = CLIPS["pendulum"]
    for caption, p in zip(write_captions(clip, "parameters"), clip.parameters, strict=True):
        assert f"its radius is {p['radius']:.1f}, its speed is {p['speed']:.1f}" in caption


def test_numbers_are_words():
    assert [number_word(x) for x in (0.0, 2.345, 9.949, 9.95, 31.4)] == ["0.0", "2.3", "9.9", "10", "31"]
    assert len(set(NUMBER_WORDS)) == len(NUMBER_WORDS) == 190


def test_clips_of_unknown_scenarios_keep_their_caption():
    clip = Clip(
        torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8), ("riding a bike",), ("videos",), ("id",), torch.tensor([0])
    )
    for level in CAPTION_LEVELS:
        assert write_captions(clip, level, 0) == (("",) if level == "none" else ("riding a bike",))


def test_words_of_sources_are_those_of_their_scenarios():
    sources = [SimulatedSource(name, frames=2, size=8) for name in SCENARIOS]
    for level in CAPTION_LEVELS:
        assert words_of_sources(sources, level) == vocabulary_of(SCENARIOS, level)


def test_unknown_levels_and_words_are_named():
    with pytest.raises(ValueError, match="unknown caption level 'poem'"):
        write_captions(CLIPS["orbit"], "poem")
    with pytest.raises(ValueError, match="word 'orbit' is not in the model's vocabulary"):
        encode_captions(["orbit"])
