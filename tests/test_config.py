import dataclasses

import pytest

from physnb.config import (
    PRESETS,
    Guidance,
    HeadId,
    HuntConfig,
    ModelConfig,
    Perturbation,
    TextConfig,
    TrainConfig,
    choose,
    from_json,
    head_set,
    preset,
    to_json,
)


def test_head_prints_and_parses_the_same():
    assert str(HeadId(3, 7)) == "L3H7"
    assert HeadId.parse(" L12H10 ") == HeadId(12, 10)


@pytest.mark.parametrize("text", ["", "3,7", "L3", "l3h7", "L-1H0", "L3H7x"])
def test_head_that_does_not_read_like_one_is_refused(text):
    with pytest.raises(ValueError, match="not of the form L<layer>H<head>, for example L3H7"):
        HeadId.parse(text)


def test_head_set_is_sorted_unique_and_independent_of_the_form_given():
    heads = (HeadId(0, 1), HeadId(0, 10), HeadId(3, 7))
    assert head_set("L3H7, L0H10,L0H1,L3H7") == heads
    assert head_set([HeadId(3, 7), (0, 1), "L0H10"]) == heads
    assert hash(head_set("L0H1")) == hash((HeadId(0, 1),))


def test_choose_names_value_and_choices():
    with pytest.raises(ValueError, match="unknown fruit 'pear'; choose one of apple, plum"):
        choose("fruit", "pear", ("apple", "plum"))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name):
    row = preset(name)
    assert from_json(TrainConfig, to_json(row.train)) == row.train
    assert from_json(HuntConfig, to_json(row.hunt)) == row.hunt


def test_hunt_survives_json_with_every_setting_changed():
    hunt = HuntConfig(
        scenarios=("collision",), split="id", objective="reward", selection_cases=1, confirmation_cases=2, top_k=3,
        rounds=2, search="race", confidence=0.8, weight=1.5, strength=0.5, kind="blur", axis="time", steps=4,
        random_draws=5, frames_given=2, seed=6,
    )  # fmt: skip
    assert from_json(HuntConfig, to_json(hunt)) == hunt != HuntConfig()


def test_hunt_guides_away_from_its_own_perturbation():
    hunt = HuntConfig(weight=1.5, strength=0.5, kind="uniform", axis="space")
    ((weight, weak),) = hunt.guidance(head_set("L0H1")).weak
    assert (weight, weak) == (1.5, Perturbation(head_set("L0H1"), 0.5, "uniform", "space"))


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match="unknown preset 'tiny'; choose one of smoke, quick, full, refine, fine, polish, collide, small",
    ):
        preset("tiny")


def test_every_preset_has_more_heads_than_it_picks():
    # top k of all heads would leave nothing to choose
    for row in PRESETS.values():
        assert row.hunt.top_k < row.train.model.depth * row.train.model.heads


def test_unknown_json_setting_is_refused_by_name_at_any_depth():
    with pytest.raises(ValueError, match=r"unknown TrainConfig setting momentum, speed; known: .*batch"):
        from_json(TrainConfig, {"speed": 1, "momentum": 0.9})
    with pytest.raises(ValueError, match="unknown ModelConfig setting colour"):
        from_json(TrainConfig, {"model": {"colour": 1}})


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (ModelConfig, dict(frames=0), r"frames must be positive, got 0"),
        (ModelConfig, dict(depth=-1), r"depth must be positive, got -1"),
        (ModelConfig, dict(frames=7), r"patch \(2, 8, 8\) must divide frames 7 and size 32"),
        (ModelConfig, dict(size=36), r"patch \(2, 8, 8\) must divide frames 16 and size 36"),
        (ModelConfig, dict(width=100), r"width 100 must split into 8 heads"),
        (ModelConfig, dict(width=32), r"width 32 must split into 8 heads of an even size of at least 6"),
        (TrainConfig, dict(steps=0), r"steps must be positive, got 0"),
        (TrainConfig, dict(batch=-4), r"batch must be positive, got -4"),
        (TrainConfig, dict(learning_rate=0.0), r"learning_rate must be positive, got 0"),
        (TrainConfig, dict(learning_rate=float("nan")), r"learning_rate must be positive, got nan"),
        (TrainConfig, dict(seed=-1), r"seed must not be negative, got -1"),
        (TrainConfig, dict(start_drop=1.5), r"start_drop must be in \[0, 1\], got 1.5"),
        (TrainConfig, dict(caption_drop=-0.1), r"caption_drop must be in \[0, 1\], got -0.1"),
        (TrainConfig, dict(ema_decay=2.0), r"ema_decay must be in \[0, 1\], got 2"),
        (TrainConfig, dict(frames_given=16), r"frames_given must be in \[0, 15\], got 16"),
        (TrainConfig, dict(sources=(), source_weights=()), r"must name at least one source"),
        (TextConfig, dict(level="poem"), r"unknown caption level 'poem'; choose one of none, label"),
        (TextConfig, dict(layers=-1), r"text layers must not be negative, got -1"),
        (TextConfig, dict(encoder="a"), r"a text encoder needs its width"),
        (TextConfig, dict(encoder="a", width=8, layers=1), r"a pretrained encoder has its own"),
        (TrainConfig, dict(source_weights=(1, 1)), r"must give a positive weight to each of"),
        (TrainConfig, dict(source_weights=(1, 0, 1)), r"must give a positive weight to each of"),
        (HuntConfig, dict(scenarios=("pendulums",)), r"unknown scenario 'pendulums'; choose one of"),
        (HuntConfig, dict(split="test"), r"unknown split 'test'; choose one of train, id, ood"),
        (HuntConfig, dict(top_k=0), r"top_k must be positive, got 0"),
        (HuntConfig, dict(selection_cases=-3), r"selection_cases must be positive, got -3"),
        (HuntConfig, dict(confirmation_cases=0), r"confirmation_cases must be positive, got 0"),
        (HuntConfig, dict(strength=1.5), r"strength.* must be in \[0, 1\], got 1.5"),
        (HuntConfig, dict(weight=float("nan")), r"weight.*nan"),
        (HuntConfig, dict(seed=-1), r"seed must not be negative, got -1"),
        (HuntConfig, dict(scenarios=()), r"must name at least one scenario"),
        (HuntConfig, dict(rounds=0), r"rounds must be positive, got 0"),
        (HuntConfig, dict(steps=0), r"steps must be positive, got 0"),
        (HuntConfig, dict(random_draws=0), r"random_draws must be positive, got 0"),
        (HuntConfig, dict(frames_given=0), r"frames_given must be positive, got 0"),
        (HuntConfig, dict(search="guess"), r"unknown search 'guess'; choose one of exhaustive, race"),
        (HuntConfig, dict(confidence=0.0), r"confidence must be in \(0, 1\), got 0"),
        (HuntConfig, dict(confidence=1.0), r"confidence must be in \(0, 1\), got 1"),
        (HuntConfig, dict(confidence=float("nan")), r"confidence must be in \(0, 1\), got nan"),
        (HuntConfig, dict(promise="luck"), r"unknown promise 'luck'; choose one of"),
        (HuntConfig, dict(budget=-1), r"budget must not be negative, got -1"),
        (HuntConfig, dict(kind="magic"), r"unknown perturbation kind 'magic'; choose one of identity"),
        (HuntConfig, dict(axis="depth"), r"unknown perturbation axis 'depth'; choose one of all, space, time"),
        (HuntConfig, dict(kind="zero", axis="time"), r"kind 'zero' has no axis"),
        (Perturbation, dict(heads="L0H0", strength=1.01), r"strength u must be in \[0, 1\], got 1.01"),
        (Perturbation, dict(heads="L0H0", strength=float("nan")), r"strength u must be in \[0, 1\], got nan"),
        (Perturbation, dict(heads="L0H0", kind="blurr"), r"unknown perturbation kind 'blurr'; choose one of identity"),
        (Guidance, dict(text_weight=float("nan")), r"weight.*nan"),
    ],
)
def test_out_of_range_setting_names_itself_and_what_is_allowed(kind, setting, message):
    with pytest.raises(ValueError, match=message):
        kind(**setting)


def test_settings_cannot_be_changed_after_the_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().batch = 0


def test_guidance_from_heads_has_one_weak_model():
    guidance = Guidance.from_heads("L1H0,L0H2", 1.5, 0.25)
    assert guidance.text_weight == 0
    assert guidance.weak == ((1.5, Perturbation(head_set("L0H2,L1H0"), 0.25)),)
