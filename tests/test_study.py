import dataclasses
import json
from dataclasses import asdict

import pytest
import torch

from physnb.config import Guidance, HuntConfig, from_json, head_set, preset, to_json
from physnb.confirm import ArmResult
from physnb.data import simulate
from physnb.data.catalogue import open_source, words_of_sources
from physnb.metrics import metric_trajectory
from physnb.metrics.trajectory import RESTORE, shared_motion, training_pull
from physnb.model import VideoDiT
from physnb.store import TrialStore, read_json
from physnb.study import HYPOTHESES, PARTS, PLANS, StudyPlan, compare, judge, run_study
from physnb.study.final import best_setting
from physnb.study.plan import (
    FORMS,
    INTERVALS,
    LIKELIHOOD,
    MIXED,
    MOTION,
    OBJECTIVES,
    PRESENCE,
    SECOND_WEIGHTS,
)
from physnb.study.reading import agreement_matrices, head_maps, surfaces
from physnb.study.subject import STORE_FILE, Study
from physnb.study.verdicts import HOLDS, REFUTED, UNDECIDED
from physnb.study.wider import broken, second_trials, settings_of

# One world, one phenomenon: every part in half a minute.
TINY = dataclasses.replace(
    PLANS["smoke"],
    hunt=HuntConfig(
        scenarios=("collision",), objective=MOTION, selection_cases=4, confirmation_cases=4, top_k=2, steps=2
    ),
    phenomena=("drag",),
    weights=(2.0,),
    strengths=(1.0,),
)


@pytest.fixture(scope="module")
def models():
    """The model, a worse one and another training: random weights everywhere, and the words of every world."""
    sources = [open_source(name, frames=8, size=16) for name in ("collision", "drag")]
    words = words_of_sources(sources, "description")
    made = [VideoDiT(**asdict(preset("smoke").train.model), vocabulary=words).eval() for _ in range(3)]
    for seed, model in enumerate(made):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return made


def run(models, folder, **settings):
    model, worse, twin = models
    return run_study(TINY, model, folder, others=dict(worse=worse), twin=twin, progress=False, **settings)


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Folder and tables of a whole study; shared, so never changed."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    return folder, run(models, folder)


# --- plan


def test_a_model_that_cannot_read_a_phenomenon_is_refused_before_anything_is_made(models, tmp_path):
    wordless = VideoDiT(**asdict(preset("smoke").train.model), vocabulary=("a", "disc")).eval()
    with pytest.raises(ValueError, match=r"the twin was not trained on collision.*caption word.*--source collision"):
        run_study(TINY, models[0], tmp_path / "none", twin=wordless, progress=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", PLANS)
def test_plans_come_back_from_json(name):
    assert from_json(StudyPlan, to_json(PLANS[name])) == PLANS[name]


def test_plans_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="3 rounds cannot share top k 8 evenly"):
        StudyPlan(rounds=3)
    with pytest.raises(ValueError, match="twice the map cases must be among the selection cases"):
        StudyPlan(map_cases=17)
    with pytest.raises(ValueError, match="study orders must be positive, got 0"):
        StudyPlan(orders=0)


def test_every_hypothesis_has_a_rule_and_a_part_that_decides_it():
    assert {h.table for h in HYPOTHESES} <= set(PARTS)
    assert len({h.name for h in HYPOTHESES}) == len(HYPOTHESES)


# --- parts


def test_every_part_leaves_its_table(finished):
    folder, tables = finished
    assert list(tables) == list(PARTS)
    for name, rows in tables.items():
        assert rows and rows == read_json(folder / f"{name}.json"), name
    heads = 2 * 4
    assert len(tables["maps"]) == len(FORMS) * len(OBJECTIVES) * heads
    names = {row["first"] for row in tables["objectives"]} | {row["second"] for row in tables["objectives"]}
    assert names == {*OBJECTIVES, LIKELIHOOD, "kernel_distance"}
    assert {row["tested_on"] for row in tables["transfer"]} >= {"worlds", "phenomena", "another training"}


def test_final_tables_have_every_method_and_one_best_set(finished):
    _, tables = finished
    for part, cases in (("final", 4), ("final_id", 4)):
        rows = {row["method"]: row for row in tables[part]}
        roles = [row["role"] for row in rows.values()]
        assert [roles.count(role) for role in ("best set", "best control", "random")] == [1, 1, 1]
        assert {"unguided", "CFG", "all heads", "2 random heads", "AutoGuidance, worse"} <= set(rows)
        best = next(row for row in rows.values() if row["role"] == "best set")
        control = next(row for row in rows.values() if row["role"] == "best control")
        assert best["method"].startswith("hunted: ") and not control["method"].startswith("hunted: ")
        assert best["promised"]["mean"] == min(r["promised"]["mean"] for r in rows.values() if "hunted" in r["method"])
        assert {f"against {name}" for name in (control["method"], "2 random, as best")} <= set(best) or best["heads"]
        assert all(row[PRESENCE]["cases"] == cases for row in rows.values())
    assert {row["setting"] for row in tables["final"]} == {row["setting"] for row in tables["final_id"]}


def test_a_plain_difference_is_that_of_the_stored_scores(finished):
    """The table of one method, computed once more from the rows in the store."""
    folder, tables = finished
    row = next(row for row in tables["final"] if row["method"] == "all heads")
    with TrialStore(folder / STORE_FILE) as store:
        table = store.table()
    weight, interval = row["setting"].removeprefix("w = ").split(", ")
    shares = {"all steps": "", "first 3 of 5": " stop=0.6", "last 3 of 5": " start=0.4"}[interval]
    every = ",".join(f"L{layer}H{head}" for layer in range(2) for head in range(4))
    guided = table[table["name"] == f"identity u=1 w={weight} {every}{shares}"].set_index("case_name")
    plain = table[table["name"] == "unguided"].set_index("case_name")
    cases = [name for name in guided.index if name in plain.index and not name.startswith("collision/id")]
    fresh = [name for name in dict.fromkeys(cases) if int(name.split("/")[2]) >= TINY.hunt.selection_cases]
    wanted = {name: [x.loc[[n], MIXED].iloc[0] for n in fresh] for name, x in (("guided", guided), ("plain", plain))}
    expected = sum(wanted["guided"]) / len(fresh)
    assert row[MIXED]["mean"] == pytest.approx(expected, rel=1e-5)


def test_the_second_study_has_every_role_once_on_cases_of_its_own(finished):
    _, tables = finished
    wanted = ["best set", "best control", "random", "one step", "first best set"]
    for part, cases in (("wider", 8), ("wider_id", 4)):
        rows = tables[part]
        assert sorted(row["role"] for row in rows if row["role"]) == sorted(wanted)
        best = next(row for row in rows if row["role"] == "best set")
        others = {row["method"] for row in rows if row["role"] not in ("", "best set")}
        assert {name.removeprefix("against ") for name in best if name.startswith("against ")} == others
        assert all(row[PRESENCE]["cases"] == cases for row in rows)
        for row in rows:
            if row["role"]:  # a difference is to unguided clips of the usual steps, whatever the method's own
                unguided = next(r for r in rows if r["method"] == "unguided")
                change = row[MIXED]["mean"] - unguided[MIXED]["mean"]
                assert row[MIXED]["difference"]["mean"] == pytest.approx(change, abs=1e-5)
    assert tables["pull"][0]["role"] == "unguided"
    assert sorted(row["role"] for row in tables["pull"]) == sorted([*wanted, "unguided"])


def test_the_cases_of_the_second_study_are_of_no_other_part(models, tmp_path):
    study = Study(TINY, models[0], tmp_path, {})
    first = [study.trials(part).subject.case_names for part in ("selection", "confirmation")]
    second = [second_trials(study, part, TINY.hunt.steps).subject.case_names for part in ("selection", "confirmation")]
    names = [name for part in (*first, *second) for name in part]
    assert len(set(names)) == len(names) == 4 + 4 + 8 + 8


def test_every_setting_of_a_method_is_looked_at_once(models, tmp_path):
    study = Study(TINY, models[0], tmp_path, {})
    heads = broken(head_set("L0H1"), FORMS[0])
    found = settings_of(study, heads)
    assert len(found) == len(SECOND_WEIGHTS) * (len(INTERVALS) + 1) == len(set(found.values()))
    assert str(next(iter(found))) == "w = 1, u = 1, all steps"
    assert [str(setting) for setting in found][-1] == "w = 8, u = 1, one step"
    weak = dataclasses.replace(TINY, strengths=(0.5, 1.0))
    text = settings_of(Study(weak, models[0], tmp_path, {}), lambda w, u: (Guidance(text_weight=w),))
    assert len(text) == len(found), "a method without strength has none to choose"


def test_unguided_sampling_is_compared_with_the_steps_of_the_hunt(finished):
    rows = finished[1]["sampling"]
    assert all({MOTION, MIXED, PRESENCE} <= set(row) for row in rows), "every step count is judged by every score"
    assert [(row["split"], row["steps"]) for row in rows] == [(s, n) for s in ("id", "ood") for n in (1, 2)]
    assert all(row[MIXED]["difference"]["mean"] == 0 for row in rows if row["steps"] == TINY.hunt.steps)
    assert all(row[MIXED]["difference"]["mean"] != 0 for row in rows if row["steps"] != TINY.hunt.steps)


def test_a_killed_study_goes_on_and_ends_with_the_same_tables(models, finished, tmp_path, monkeypatch):
    def killed(study):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(PARTS, "rounds", killed)
        with pytest.raises(KeyboardInterrupt):
            run(models, tmp_path / "study")
    assert (tmp_path / "study" / "kinds.json").exists() and not (tmp_path / "study" / "rounds.json").exists()
    with pytest.raises(ValueError, match="already holds a run"):
        run(models, tmp_path / "study")
    wanted = ("rounds", "steps")
    assert run(models, tmp_path / "study", only=wanted, resume=True)["rounds"] == finished[1]["rounds"]
    with pytest.raises(ValueError, match="another plan or other models"):
        run(models[::-1], tmp_path / "study", resume=True)


def test_an_unknown_part_is_refused_before_anything_is_written(models, tmp_path):
    with pytest.raises(ValueError, match="the study has no part maps2; its parts are maps, kinds"):
        run(models, tmp_path / "study", only=["maps2"])
    assert not (tmp_path / "study").exists()


# --- choosing


def arm(motion: float, lost: float) -> ArmResult:
    """A method that changes the velocity error and the missing rate by so much in every case."""
    zeros = torch.zeros(4)
    return ArmResult("", {MOTION: zeros + motion, PRESENCE: zeros + lost}, {MOTION: zeros, PRESENCE: zeros})


def test_a_setting_that_loses_discs_is_not_chosen_however_well_the_others_move():
    arms = {(1.0, "a"): arm(-0.1, 0.0), (2.0, "a"): arm(-0.5, 0.05), (4.0, "a"): arm(-0.2, 0.005)}
    assert best_setting(arms) == (4.0, "a")
    assert best_setting({k: arm(-0.1 * k[0], 0.02 * k[0]) for k in arms}) == (1.0, "a")  # all lose some: the fewest


# --- shared presence


def test_shared_motion_judges_both_clips_on_the_frames_that_show_the_disc_in_both():
    true = simulate("uniform", "id", range(6), frames=12, size=64)
    late = true.frames.clone()
    late[:, 6:] = 255  # the disc vanishes half way
    shifted = true.frames.roll(3, dims=3)
    made, other = (dataclasses.replace(true, frames=frames) for frames in (late, shifted))
    found = shared_motion(made, other, true)
    head = dataclasses.replace(true, frames=shifted.clone())
    head.frames[:, 6:] = 255
    alone = metric_trajectory(head, true, restore=RESTORE)
    for name, (mine, theirs) in found.items():
        floor = metric_trajectory(made, true, restore=RESTORE)[name].values
        assert torch.allclose(mine, floor, atol=1e-6, equal_nan=True), name
        assert torch.allclose(theirs, alone[name].values, atol=1e-6, equal_nan=True), name
    blank = dataclasses.replace(true, frames=torch.full_like(true.frames, 255))
    assert all(values.isnan().all() for pair in shared_motion(blank, other, true).values() for values in pair)


# --- pull


@pytest.mark.parametrize("world", ["uniform", "collision"])
def test_true_clips_are_not_pulled_and_frozen_ones_are_by_their_whole_speed(world):
    true = simulate(world, "ood", range(24), frames=16, size=64)
    start = true.state.velocities[:, 0, :, 0].abs()
    sides = dict(slow=start < 1, fast=start > 4)
    for name, pulled in training_pull(true, true).items():
        known = ~pulled.isnan()
        assert known.any() and not (known & ~sides[name].any(1)).any()
        assert pulled[known].abs().max() < 0.08, name  # few frames before an impact
    frozen = dataclasses.replace(true, frames=true.frames[:, 2:3].expand_as(true.frames).contiguous())
    for name, sign in (("slow", -1), ("fast", 1)):
        pulled = training_pull(frozen, true)[name]
        chosen = start.where(sides[name], torch.nan)
        alone = (sides[name].sum(1) == 1) & ~pulled.isnan()  # a mean of two may judge only one of them
        assert alone.any() and torch.allclose(pulled[alone], sign * chosen.nanmean(1)[alone], atol=0.05), name


# --- verdicts


def estimate(mean: float, low: float, high: float) -> dict:
    return dict(mean=mean, low=low, high=high, judged=9, cases=9)


def final_table(relative: dict, against: dict | None = None) -> list[dict]:
    best = dict(
        method="hunted: 8 by tracking", role="best set", heads="L0H1", setting="w = 2", relative={MOTION: relative}
    )
    best |= {PRESENCE: dict(difference=estimate(-0.02, -0.03, -0.01))}
    best |= {f"against {name}": {MOTION: against} for name in ("8 random, as best", "CFG")}
    others = [dict(method="8 random, as best", role="random"), dict(method="CFG", role="best control")]
    return [best, *others]


def verdict_of(name: str, **tables) -> str:
    return {v.hypothesis.name: v.verdict for v in judge(tables)}[name]


@pytest.mark.parametrize(
    ("relative", "verdict"),
    [
        (estimate(-0.25, -0.30, -0.10), HOLDS),
        (estimate(-0.15, -0.30, -0.02), UNDECIDED),
        (estimate(-0.10, -0.18, -0.02), REFUTED),
        (estimate(-0.25, -0.60, 0.10), UNDECIDED),
        (estimate(0.01, -0.03, 0.04), REFUTED),
    ],
)
def test_the_aim_needs_a_fifth_less_error_beyond_doubt(relative, verdict):
    (found,) = [v for v in judge(dict(final=final_table(relative, estimate(0, -1, 1)))) if v.hypothesis.name == "aim"]
    assert found.verdict == verdict
    assert ("well-powered no" in found.numbers) == (relative["low"] > -0.05 and relative["high"] < 0.05)


@pytest.mark.parametrize(("low", "high", "verdict"), [(-2, -1, HOLDS), (1, 2, REFUTED), (-1, 1, UNDECIDED)])
def test_differences_decide_by_their_interval(low, high, verdict):
    table = final_table(estimate(0, -0.3, 0.3), estimate((low + high) / 2, low, high))
    for name in ("better than random", "better than controls"):
        assert verdict_of(name, final=table) == verdict
    opposite = {HOLDS: REFUTED, REFUTED: HOLDS, UNDECIDED: UNDECIDED}[verdict]
    inside = [dict(role="best set") | {MOTION: dict(difference=estimate(0, low, high))}]
    assert verdict_of("price", final_id=inside) == opposite
    moved = dict(hunted_on="worlds", against_random=estimate(0, low, high))
    rows = [moved | dict(tested_on=name) for name in ("phenomena", "another training")]
    assert verdict_of("transfer", transfer=rows) == verdict
    assert verdict_of("another training", transfer=rows) == (HOLDS if verdict == UNDECIDED else REFUTED)


def test_presence_first_is_refuted_by_motion_that_improves():
    def of(relative):
        return verdict_of("presence first", final=final_table(relative, estimate(0, -1, 1)))

    assert of(estimate(0.0, -0.04, 0.04)) == HOLDS
    assert of(estimate(-0.1, -0.2, -0.01)) == REFUTED
    assert of(estimate(0.1, -0.1, 0.3)) == UNDECIDED


@pytest.mark.parametrize(
    ("unguided", "change", "verdict"),
    [
        ((0.3, 0.2, 0.4), (-0.1, -0.2, -0.05), HOLDS),
        ((0.3, 0.2, 0.4), (-0.1, -0.2, 0.05), UNDECIDED),
        ((0.3, 0.2, 0.4), (0.1, 0.05, 0.2), REFUTED),
        ((-0.3, -0.4, -0.2), (-0.1, -0.2, -0.05), REFUTED),
    ],
)
def test_pull_holds_only_for_slow_and_fast_discs_alike(unguided, change, verdict):
    clear = estimate(0.5, 0.4, 0.6), estimate(-0.2, -0.3, -0.1)
    for mine, other in (("slow", "fast"), ("fast", "slow")):
        rows = [
            {"role": "unguided", mine: estimate(*unguided), other: clear[0]},
            {"role": "best set", mine: dict(difference=estimate(*change)), other: dict(difference=clear[1])},
        ]
        assert verdict_of("pull", pull=rows) == verdict


def test_hunts_repeat_only_if_every_pair_does():
    def of(*chances):
        shared = [dict(shared=3, chosen=8, expected=1.3, p=p) for p in chances]
        return verdict_of("hunts repeat", repetitions=[dict(objective=MIXED, shared=s) for s in shared])

    assert [of(0.01, 0.04), of(0.01, 0.2), of(0.3, 0.2)] == [HOLDS, UNDECIDED, REFUTED]


def test_verdicts_come_from_a_whole_study_and_only_from_tables_that_are_there(finished):
    _, tables = finished
    found = judge(tables)
    assert [v.hypothesis for v in found] == list(HYPOTHESES)
    assert all(v.verdict in (HOLDS, REFUTED, UNDECIDED) and v.numbers for v in found)
    assert {v.hypothesis.table for v in judge(dict(final=tables["final"]))} == {"final"}


# --- comparing


def test_a_rerun_agrees_with_itself_and_a_moved_estimate_is_named(finished):
    _, tables = finished
    assert all(row["agrees"] and row["within"] == 1 for row in compare(tables, tables))
    moved = json.loads(json.dumps(tables))
    for row in moved["maps"]:
        row["mean"] = None if row["mean"] is None else row["high"] + 1
    rows = {row["table"]: row for row in compare(tables, moved)}
    assert not rows["maps"]["agrees"] and rows["maps"]["first_outside"] and rows["kinds"]["agrees"]
    with pytest.raises(ValueError, match="no table to compare"):
        compare(tables, {})


# --- reading


def test_tables_become_maps_matrices_and_surfaces(finished):
    _, tables = finished
    maps = head_maps(tables["maps"], MIXED)
    assert list(maps) == [str(form) for form in FORMS] and all(table.shape == (2, 4) for table in maps.values())
    row = next(row for row in tables["maps"] if (row["form"], row["objective"], row["head"]) == ("blur", MIXED, "L1H2"))
    assert float(maps["blur"][1, 2]) == pytest.approx(row["mean"])
    with pytest.raises(ValueError, match="say nothing of beauty"):
        head_maps(tables["maps"], "beauty")
    names, rho, low, high = agreement_matrices(tables["objectives"])
    assert set(names) == {*OBJECTIVES, LIKELIHOOD, "kernel_distance"} and torch.equal(
        rho.nan_to_num(), rho.T.nan_to_num()
    )
    known = ~rho.isnan()
    assert bool((low[known] <= high[known]).all()) and bool(rho.diagonal().isnan().all())
    assert agreement_matrices(tables["objectives"], [MIXED, "reward"])[0] == [MIXED, "reward"]
    found = surfaces(tables["surface"], MIXED, "interval")
    assert set(found) == {MOTION, MIXED, PRESENCE, "position_error/restored"} and (0.0, 1.0) in found[MIXED]
    with pytest.raises(ValueError, match="no interval grid of heads found by luck"):
        surfaces(tables["surface"], "luck", "interval")
