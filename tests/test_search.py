import dataclasses
import json

import pytest
import torch

from physnb.config import Guidance, HeadId, HuntConfig, head_set
from physnb.data import simulate
from physnb.families import attention_layers, heads_of
from physnb.search import (
    METRIC_UNITS,
    HeadRanking,
    confirm,
    confirmation_cases,
    control_arms,
    hunt_heads,
    hunted_heads,
    random_head_sets,
    require_disjoint,
    selection_cases,
    strength_surface,
    trial_key,
)
from physnb.store import TrialStore, write_json

PLANTED = HeadId(1, 2)
HUNT = HuntConfig(split="id", selection_cases=3, confirmation_cases=4, top_k=2, steps=2, random_draws=2, weight=3.0)
LOUD = 0.05  # units: an effect that nothing but a head can have
GREY_LEVEL = 0.02  # units: what float rounding, as one grey level in a pixel or two, can move a centroid


def only_head(make_model, planted=PLANTED, seed=0):
    """A model in which no other head reaches the output: their columns of the output projection are zero.

    The planted head is made loud, so that its effect is far above what rounding can do.
    """
    model = make_model(seed)
    for layer, attention in enumerate(layer.module for layer in attention_layers(model)):
        columns = attention.out.weight.unflatten(1, (attention.heads, -1))
        for head in range(attention.heads):
            columns[:, head] *= 5.0 if (layer, head) == planted else 0.0
    return model


@pytest.fixture(scope="module")
def planted_model(make_model):
    """The first random model in which guiding away from the planted head helps; in a random one it may also hurt."""
    for seed in range(20):
        model = only_head(make_model, seed=seed)
        if hunt_heads(model, HUNT, heads=(PLANTED,), progress=False).effects.mean() < -LOUD:
            return model
    raise AssertionError("the planted head helps in none of 20 models")


@pytest.fixture(scope="module")
def ranking(planted_model) -> HeadRanking:
    return hunt_heads(planted_model, HUNT, progress=False)


def test_planted_head_is_found_first(ranking):
    assert ranking.order()[0] == PLANTED and ranking.top(1) == (PLANTED,)
    best = ranking.to_rows()[0]
    assert best["head"] == "L1H2" and best["mean"] < -LOUD


def test_heads_without_influence_have_exactly_no_effect(ranking):
    # every head sees the same cases and the same noise, so nothing but the head itself can make a difference
    for head, effects in zip(ranking.heads, ranking.effects, strict=True):
        if head != PLANTED:
            assert torch.equal(effects, torch.zeros_like(effects)), head


def test_batches_of_another_size_give_the_same_effects(planted_model, ranking):
    for batch_size in (9, 1, 1000):
        again = hunt_heads(planted_model, HUNT, batch_size=batch_size, progress=False)
        torch.testing.assert_close(again.effects, ranking.effects, atol=GREY_LEVEL, rtol=0)


def test_every_head_is_hunted_in_every_selection_case(model, ranking):
    assert ranking.heads == heads_of(model)
    assert ranking.effects.shape == (8, 9) and ranking.baseline.shape == (9,)


def test_ranking_puts_the_most_negative_mean_first():
    heads = head_set("L0H0,L0H1,L1H0")
    effects = torch.tensor([[0.5, 0.1], [-0.2, torch.nan], [-0.3, 0.2]])
    ranking = HeadRanking(heads, effects, torch.zeros(2), "tracking_error", HUNT)
    assert [str(head) for head in ranking.order()] == ["L0H1", "L1H0", "L0H0"]
    assert ranking.top(2) == head_set("L0H1,L1H0")
    assert [row["judged"] for row in ranking.to_rows()] == [1, 2, 2]
    table = ranking.layer_map()
    assert table[0].tolist() == pytest.approx([0.3, -0.2]) and table[1, 0] == pytest.approx(-0.05)
    assert table[1, 1].isnan()  # not hunted
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"top k must be in \[1, 3\], got {k}"):
            ranking.top(k)


def test_selection_and_confirmation_share_no_case(model):
    chosen, judged = selection_cases(model, HUNT), confirmation_cases(model, HUNT)
    require_disjoint(chosen, judged)
    assert len(chosen) == 9 and len(judged) == 12
    known = {tuple(f.flatten().tolist()) for f in chosen.frames}
    assert not known & {tuple(f.flatten().tolist()) for f in judged.frames}


def test_confirming_on_a_selection_case_is_refused(model):
    cases = simulate("collision", "id", range(2, 6), frames=8, size=16, seed=HUNT.seed)  # number 2 was chosen on
    for judge in (
        lambda: confirm(model, HUNT, (PLANTED,), cases=cases, progress=False),
        lambda: strength_surface(model, HUNT, (PLANTED,), [1.0], [1.0], cases=cases, progress=False),
    ):
        with pytest.raises(ValueError, match=r"1 cases are used both to choose and to confirm.*'collision', 'id', 2"):
            judge()


def test_controls_are_always_there(model):
    arms = control_arms(model, HUNT, head_set("L0H1,L1H2"))
    assert list(arms) == ["unguided", "CFG", "2 random heads", "all heads", "2 hunted heads"]
    assert arms["unguided"] == [Guidance()]
    assert arms["CFG"] == [Guidance(text_weight=1.0)]
    assert [len(arms[name]) for name in arms] == [1, 1, HUNT.random_draws, 1, 1]
    for guidance in (g for name in list(arms)[2:] for g in arms[name]):
        ((weight, perturbation),) = guidance.weak
        assert (weight, perturbation.strength) == (HUNT.weight, HUNT.strength)
    assert arms["all heads"][0].weak[0][1].heads == heads_of(model)
    assert all(len(g.weak[0][1].heads) == 2 for g in arms["2 random heads"])


def test_random_head_sets_are_reproducible_and_fair(model):
    sets = random_head_sets(model, 3, 200, seed=5)
    assert sets == random_head_sets(model, 3, 200, seed=5) != random_head_sets(model, 3, 200, seed=6)
    assert all(len(set(heads)) == 3 for heads in sets)
    counts = torch.tensor([sum(head in heads for heads in sets) for head in heads_of(model)])
    assert (counts - 75).abs().max() < 28  # four standard deviations
    with pytest.raises(ValueError, match="a set of 9 heads cannot be drawn from 8"):
        random_head_sets(model, 9, 1, seed=0)


def test_confirmation_reports_every_arm_against_unguided(planted_model):
    results = confirm(planted_model, HUNT, (PLANTED,), progress=False)
    rows = {result.name: result.to_row() for result in results}
    assert list(rows) == ["unguided", "CFG", "1 random heads", "all heads", "1 hunted heads"]
    json.dumps(list(rows.values()), allow_nan=False)
    for metric in METRIC_UNITS:
        assert rows["unguided"][metric]["difference"] is None
        assert rows["unguided"][metric]["cases"] == 12
    # all heads together are the planted one, and nothing else
    *_, everything, found = (result.values["tracking_error"] for result in results)
    torch.testing.assert_close(found, everything, atol=GREY_LEVEL, rtol=0)
    assert (found - results[0].values["tracking_error"]).abs().mean() > LOUD


def test_difference_is_paired_case_by_case(planted_model):
    arm = confirm(planted_model, HUNT, (PLANTED,), progress=False)[-1]
    expected = (arm.values["tracking_error"] - arm.baseline["tracking_error"]).mean()
    assert arm.difference("tracking_error").mean == pytest.approx(float(expected), abs=1e-5)
    assert arm.estimate("tracking_error", [0, 1]).mean == pytest.approx(float(arm.values["tracking_error"][:2].mean()))


def test_surface_is_flat_where_guidance_is_off(planted_model):
    w = HUNT.weight
    surface = strength_surface(planted_model, HUNT, (PLANTED,), [0.0, w], [0.0, 0.5, 1.0], progress=False)
    assert list(surface) == [(0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (w, 0.0), (w, 0.5), (w, 1.0)]
    for (weight, strength), arm in surface.items():
        off = weight == 0 or strength == 0
        assert (arm.difference("tracking_error").mean == 0) == off
    arm = confirm(planted_model, HUNT, (PLANTED,), progress=False)[-1]  # the corner is the hunt's own setting
    assert torch.equal(surface[w, 1.0].values["tracking_error"], arm.values["tracking_error"])


def test_unknown_head_is_named_before_work_starts(model):
    with pytest.raises(ValueError, match="head L99H0 does not exist"):
        hunt_heads(model, HUNT, heads=head_set("L0H0,L99H0"), progress=False)
    with pytest.raises(ValueError, match="head L99H0 does not exist"):
        confirm(model, HUNT, head_set("L99H0"), progress=False)


# --- stored trials


def test_hunt_stopped_half_way_ends_with_the_same_numbers(planted_model, ranking, tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        hunt_heads(planted_model, HUNT, heads=ranking.heads[:3], store=store, model_hash="m", progress=False)
    with TrialStore(tmp_path / "t.sqlite") as store:
        resumed = hunt_heads(planted_model, HUNT, store=store, model_hash="m", progress=False)
    assert torch.equal(resumed.effects, ranking.effects) and torch.equal(resumed.baseline, ranking.baseline)
    assert resumed.order() == ranking.order()


def test_stored_trials_are_read_and_not_run_again(planted_model, tmp_path):
    with TrialStore(tmp_path / "t.sqlite") as store:
        hunt_heads(planted_model, HUNT, store=store, model_hash="m", progress=False)
        key = trial_key("m", HUNT, "tracking_error", Guidance.from_heads("L0H3", HUNT.weight))
        store.connection.execute("UPDATE trials SET value = -100 WHERE trial = ?", (key,))  # no run gives this
        again = hunt_heads(planted_model, HUNT, store=store, model_hash="m", progress=False)
        assert again.order()[0] == HeadId(0, 3)
        rows = store.connection.execute("SELECT COUNT(*), COUNT(DISTINCT trial) FROM trials").fetchone()
        assert rows == (9 * 9, 9)  # the baseline and 8 heads, 9 cases each


def test_killed_hunt_resumes_to_the_same_ranking(make_model, tmp_path, start_python):
    from physnb.checkpoint import load_model, model_hash, save_model

    folder, path = save_model(only_head(make_model), tmp_path / "model"), tmp_path / "trials.sqlite"
    hunt = dataclasses.replace(HUNT, selection_cases=2)
    settings = dict(split="id", selection_cases=2, top_k=2, steps=2, random_draws=2, weight=3.0)
    # one head at a time, and the kill comes after the fourth row of the bar: between two transactions or within one
    program = f"""
from physnb.checkpoint import load_model, model_hash
from physnb.config import HuntConfig
from physnb.search import hunt_heads
from physnb.store import TrialStore, write_json
store = TrialStore({str(path)!r})
store.connection.set_trace_callback(lambda sql: print(sql[:6], flush=True))
hunt = HuntConfig(**{settings!r}, confirmation_cases=4)
model, name = load_model({str(folder)!r}), model_hash({str(folder)!r})
hunt_heads(model, hunt, store=store, model_hash=name, batch_size=6, progress=False)
"""
    process = start_python("-c", program)
    commits = 0
    for line in process.stdout:
        commits += line.startswith("COMMIT")
        if commits == 4:
            break
    process.kill()
    assert process.wait() == -9
    with TrialStore(path) as store:
        ((stored,),) = store.connection.execute("SELECT COUNT(DISTINCT trial) FROM trials")
        assert 3 <= stored < 9
        model = load_model(folder)
        resumed = hunt_heads(model, hunt, store=store, model_hash=model_hash(folder), batch_size=6, progress=False)
    whole = hunt_heads(model, hunt, batch_size=6, progress=False)
    assert torch.equal(resumed.effects, whole.effects) and resumed.order() == whole.order()


@pytest.mark.parametrize(
    "change", [dict(split="ood"), dict(seed=1), dict(steps=3), dict(frames_given=2), dict(scenarios=("uniform",))]
)
def test_trials_of_other_settings_never_mix(change):
    other = dataclasses.replace(HUNT, **change)
    assert trial_key("m", HUNT, "tracking_error", Guidance()) != trial_key("m", other, "tracking_error", Guidance())


def test_trials_of_other_models_objectives_and_guidance_never_mix():
    keys = {
        trial_key(model, HUNT, objective, guidance)
        for model in ("a", "b")
        for objective in ("tracking_error", "missing_rate")
        for guidance in (Guidance(), Guidance.from_heads("L0H1", 1.0), Guidance.from_heads("L0H1", 1.0, 0.5))
    }
    assert len(keys) == 12


def test_more_cases_and_heads_reuse_what_is_stored():
    more = dataclasses.replace(HUNT, selection_cases=10, confirmation_cases=20, top_k=4, random_draws=5)
    assert trial_key("m", HUNT, "tracking_error", Guidance()) == trial_key("m", more, "tracking_error", Guidance())


def test_heads_to_study_come_from_names_then_the_run_then_the_committed_hunt(tmp_path):
    (tmp_path / "hunt").mkdir()
    write_json(tmp_path / "hunt" / "hunted.json", [dict(head="L5H5")])
    folder = tmp_path / "model"
    assert hunted_heads("L1H0,L0H1", [dict(head="L2H2")], folder) == head_set("L0H1,L1H0")
    assert hunted_heads("", [dict(head="L2H2")], folder) == head_set("L2H2")
    assert hunted_heads("", None, folder) == head_set("L5H5")
    with pytest.raises(ValueError, match=r"hunted\.json does not exist"):
        hunted_heads("", None, tmp_path / "elsewhere" / "model")
