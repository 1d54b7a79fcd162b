"""The experiment of pretraining: what an arm trains on, what is measured of it, and how arms are compared."""

import dataclasses
from dataclasses import asdict

import pytest
import torch

from physnb.config import PHENOMENA, SCENARIOS, ModelConfig, TextConfig, preset
from physnb.data import VOCABULARY, simulate
from physnb.knowledge import (
    QUANTITIES,
    Arm,
    answer,
    arm_config,
    base_config,
    compare_arms,
    measure_arm,
    preferences,
    seed_interval,
)
from physnb.likelihood import preference_error
from physnb.model import VideoDiT

SMOKE = preset("smoke").train


# --- arms and their trainings


def test_an_arm_is_read_from_three_words():
    assert Arm.parse("law 0.5 worlds", seed=2) == Arm("law", 0.5, "worlds", 2)
    assert Arm.parse(" description  1 many ") == Arm()
    assert isinstance(Arm(physics=1).physics, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "arm '' is not of the form LEVEL SHARE VARIETY"),
        ("law many 1.0", "arm 'law many 1.0' is not of the form"),
        ("law 1.0", "is not of the form"),
        ("law 1.0 many 3", "is not of the form"),
        ("poem 1.0 many", "unknown caption level 'poem'"),
        ("law 1.0 few", "unknown variety of physics clips 'few'; choose one of worlds, many"),
        ("law 0 many", r"must be in \(0, 1\], got 0.0"),
        ("law 1.5 many", "got 1.5"),
        ("law nan many", "got nan"),
    ],
)
def test_bad_arms_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        Arm.parse(text)


def test_the_base_is_the_preset_but_for_a_smaller_quick():
    assert base_config("smoke") == SMOKE and base_config("full") == preset("full").train
    quick = base_config("quick")
    assert quick.model == ModelConfig(frames=16, size=32, patch=(2, 8, 8), width=96, depth=4, heads=6)
    same = dict(model=None, steps=None)
    assert (asdict(quick) | same) == (asdict(preset("quick").train) | same) and quick.steps == 1500
    assert base_config("quick", steps=7) == dataclasses.replace(quick, steps=7)
    with pytest.raises(ValueError, match="unknown preset 'large'"):
        base_config("large")


def test_physics_alone_is_shared_by_worlds_phenomena_and_templates():
    config = arm_config(Arm("law", seed=5), SMOKE)
    share = dict(zip(config.sources, config.source_weights, strict=True))
    assert set(share) == {*SCENARIOS, *PHENOMENA, "templates"}
    assert [share[name] for name in (*SCENARIOS, "templates")] == pytest.approx([1 / 7] * 4)
    assert [share[name] for name in PHENOMENA] == pytest.approx([1 / 21] * 9)
    assert sum(share.values()) == pytest.approx(1)
    assert config.text == TextConfig(level="law", layers=1) and config.seed == 5
    own = dict(sources=None, source_weights=None, text=None, seed=None)
    assert (asdict(config) | own) == (asdict(SMOKE) | own)  # model, steps and batch are those of all arms


def test_videos_take_the_rest():
    config = arm_config(Arm(physics=0.4, variety="worlds"), SMOKE, "clips?clips_per_video=3")
    assert config.sources == (*SCENARIOS, "videos:clips?clips_per_video=3")
    assert config.source_weights == pytest.approx((0.4 / 3, 0.4 / 3, 0.4 / 3, 0.6))
    assert arm_config(Arm(variety="worlds"), SMOKE, "clips").sources == SCENARIOS  # there is no rest to take
    with pytest.raises(ValueError, match=r"a share of 0.4 of physics clips needs a folder of videos"):
        arm_config(Arm(physics=0.4), SMOKE)


# --- measures


def value_of(rows: list[dict]) -> dict[tuple[str, str], float | None]:
    return {(row["quantity"], row["split"]): row["value"] for row in rows}


def test_every_quantity_is_measured_in_and_out_of_distribution(model):
    rows = measure_arm(model, cases=2, steps=1)
    found = value_of(rows)
    assert set(found) == {(name, split) for name in QUANTITIES for split in ("id", "ood")} and len(rows) == len(found)
    assert all(row["unit"] == QUANTITIES[row["quantity"]] for row in rows)
    for (name, _), value in found.items():
        assert value is None or 0 <= value <= (1 if QUANTITIES[name] == "share" else 20), name
    assert measure_arm(model, cases=2, steps=1) == rows
    other = value_of(measure_arm(model, cases=2, steps=1, seed=2))
    assert other["tracking error", "id"] != found["tracking error", "id"]


def test_a_model_that_draws_nothing_is_not_judged_and_does_not_succeed():
    empty = VideoDiT(**asdict(SMOKE.model), vocabulary=VOCABULARY).eval()  # before training its clips are white
    found = value_of(measure_arm(empty, cases=3, steps=1))
    for split in ("id", "ood"):
        assert found["velocity error", split] is None and found["position error", split] is None
        assert found["missing rate", split] == 1
        assert found["tracking error", split] == found["tracking error of templates", split] == 5  # its cap


def test_preferences_are_means_over_all_variants_of_a_world(model):
    from physnb.data.variants import kinds_for, make_impossible

    true = simulate("collision", "ood", range(3), frames=8, size=16, seed=1)
    scored = preference_error(model, true, [make_impossible(true, k, seed=1) for k in kinds_for("collision")], seed=1)
    found = preferences(model, true, 1)
    assert found["preference error"] == pytest.approx(float(scored["preference_error"].values.nanmean()))
    matched = scored["preference_error/matched"].values
    assert found["preference error, equal area"] == pytest.approx(float(matched.nanmean()))


# --- comparisons


def test_interval_of_trainings_is_that_of_student():
    # mean 2, deviation 1, three trainings: 4.3027 / sqrt(3) on either side (t of 2 degrees of freedom at 97.5 %)
    found = seed_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.judged, found.cases) == (2.0, 3, 3)
    assert (found.low, found.high) == (pytest.approx(2 - 2.48414, abs=1e-5), pytest.approx(2 + 2.48414, abs=1e-5))
    one = seed_interval([4.0]).to_dict()
    assert (one["mean"], one["low"], one["high"]) == (4.0, None, None)
    with pytest.raises(ValueError, match="no training to average over"):
        seed_interval([])


def rows_of(arm: Arm, value: float | None, quantity: str = "velocity error", split: str = "ood") -> dict:
    return vars(arm) | dict(quantity=quantity, split=split, unit="units/s", value=value)


def arms_of(level: str, values: list[float | None], **named) -> list[dict]:
    """One row a seed, from seed 0 on."""
    return [rows_of(Arm(level, seed=seed), value, **named) for seed, value in enumerate(values)]


def test_differences_are_paired_by_seed():
    rows = arms_of("description", [1.0, 5.0, 9.0]) + list(reversed(arms_of("law", [0.9, 4.7, 8.5])))
    own, law = compare_arms(rows)
    assert own["difference"] is None and own["value"]["mean"] == pytest.approx(5)
    assert (law["level"], law["physics"], law["variety"], law["quantity"]) == ("law", 1.0, "many", "velocity error")
    assert law["value"]["mean"] == pytest.approx(4.7) and law["difference"]["mean"] == pytest.approx(-0.3)
    half = 4.30265 * 0.2 / 3**0.5  # of -0.1, -0.3, -0.5; unpaired it would be 20 times as wide
    assert law["difference"]["low"] == pytest.approx(-0.3 - half, abs=1e-4)
    assert law["difference"]["high"] == pytest.approx(-0.3 + half, abs=1e-4)


def test_missing_values_leave_their_pair_out():
    rows = arms_of("description", [1.0, None, 3.0]) + arms_of("law", [2.0, 3.0, None])
    own, law = compare_arms(rows)
    assert own["value"]["mean"] == 2.0 and own["value"]["judged"] == 2
    assert law["value"]["mean"] == 2.5 and law["value"]["judged"] == 2
    assert law["difference"]["mean"] == 1.0 and law["difference"]["judged"] == 1  # seed 0 alone
    assert law["difference"]["low"] is None and law["difference"]["high"] is None


def test_an_arm_without_a_common_seed_has_no_difference():
    rows = [*arms_of("description", [1.0]), rows_of(Arm("law", seed=7), 2.0)]
    assert compare_arms(rows)[1]["difference"] is None


def test_arms_quantities_and_splits_do_not_mix():
    arms = {Arm(): 1.0, Arm("law"): 2.0, Arm(physics=0.5): 4.0, Arm(variety="worlds"): 8.0}
    scales = {("missing rate", "id"): 1, ("missing rate", "ood"): 10, ("tracking error", "id"): 100}
    rows = [rows_of(arm, value * scales[key], *key) for arm, value in arms.items() for key in scales]
    found = compare_arms(rows)
    assert len(found) == 12
    for row in found:
        scale = scales[row["quantity"], row["split"]]
        value = arms[Arm(row["level"], row["physics"], row["variety"])]
        assert row["value"]["mean"] == value * scale
        if value == 1:
            assert row["difference"] is None
        else:
            assert row["difference"]["mean"] == (value - 1) * scale
    other = [row for row in compare_arms(rows, Arm("law", seed=3)) if row["difference"] and row["split"] == "ood"]
    assert [row["difference"]["mean"] for row in other] == [-10, 20, 60]


def test_a_baseline_that_was_not_trained_is_an_error():
    with pytest.raises(ValueError, match=r"no training has the settings of the baseline, \('none', 1.0, 'many'\)"):
        compare_arms(arms_of("law", [1.0]), Arm("none"))
    with pytest.raises(ValueError, match="no training has the settings"):
        compare_arms(arms_of("description", [None]) + arms_of("law", [1.0]))


def test_the_answer_claims_no_more_than_the_intervals():
    rows = arms_of("description", [1.0, 2.0, 3.0])
    rows += arms_of("law", [0.5, 1.4, 2.6]) + arms_of("label", [1.5, 2.6, 3.4]) + arms_of("none", [0.5, 2.5, 3.5])
    rows += [rows_of(Arm(physics=0.2, variety="worlds"), 0.0)]
    rows += arms_of("law", [1.0], split="id")  # is not asked for
    rows += arms_of("description", [2.0], split="id")
    better, worse, open_, single = answer(compare_arms(rows), "velocity error", "ood", "units/s")
    assert better == "law captions, 100% physics (many): -0.500 [-0.748, -0.252] units/s, better"
    assert worse.startswith("label captions") and "+0.500 [+0.252, +0.748]" in worse and worse.endswith(", worse")
    assert open_.startswith("none captions") and open_.endswith("units/s, no difference seen at this size")
    assert single == ("description captions, 20% physics (worlds): -1.000 units/s, undecided by one training")
    assert answer(compare_arms(rows), "missing rate", "ood", "share") == []


def test_inputs_are_not_changed():
    rows = arms_of("description", [1.0]) + arms_of("law", [2.0])
    before = [dict(row) for row in rows]
    answer(compare_arms(rows), "velocity error", "ood", "units/s")
    assert rows == before


def test_measuring_leaves_global_random_numbers_alone(model):
    before = torch.get_rng_state()
    measure_arm(model, cases=1, steps=1)
    assert torch.equal(torch.get_rng_state(), before)
