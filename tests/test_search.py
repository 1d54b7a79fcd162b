import dataclasses
import math

import pytest
import torch
from subjects_for_tests import table_trials

from physnb.config import HeadId, HuntConfig, head_set
from physnb.families import attention_layers, heads_of
from physnb.objectives import OBJECTIVES
from physnb.ranking import HeadRanking, rank_heads
from physnb.search import Power, hunt_heads, hunted_heads, pilot_power
from physnb.store import write_json
from physnb.subjects import simulated_subject
from physnb.trials import Trials

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


def trials_of(model, hunt=HUNT, part="selection", **settings) -> Trials:
    return Trials(simulated_subject(model, hunt, part), progress=False, **settings)


@pytest.fixture(scope="module")
def planted_model(make_model):
    """The first random model in which guiding away from the planted head helps; in a random one it may also hurt."""
    for seed in range(20):
        model = only_head(make_model, seed=seed)
        if rank_heads(trials_of(model), HUNT.guidance, (PLANTED,)).effects.mean() < -LOUD:
            return model
    raise AssertionError("the planted head helps in none of 20 models")


@pytest.fixture(scope="module")
def ranking(planted_model) -> HeadRanking:
    return hunt_heads(trials_of(planted_model), HUNT).ranking


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
        again = rank_heads(trials_of(planted_model, batch_size=batch_size), HUNT.guidance)
        torch.testing.assert_close(again.effects, ranking.effects, atol=GREY_LEVEL, rtol=0)


def test_every_head_is_hunted_in_every_selection_case(model, ranking):
    assert ranking.heads == heads_of(model)
    assert ranking.effects.shape == (8, 9)
    assert ranking.label == "tracking error minus unguided (units)"


def test_ranking_puts_the_most_negative_mean_first():
    heads = head_set("L0H0,L0H1,L1H0")
    effects = torch.tensor([[0.5, 0.1], [-0.2, torch.nan], [-0.3, 0.2]])
    ranking = HeadRanking(heads, effects, OBJECTIVES["tracking_error"])
    assert [str(head) for head in ranking.order()] == ["L0H1", "L1H0", "L0H0"]
    assert ranking.top(2) == head_set("L0H1,L1H0")
    assert [row["judged"] for row in ranking.to_rows()] == [1, 2, 2]
    table = ranking.layer_map()
    assert table[0].tolist() == pytest.approx([0.3, -0.2]) and table[1, 0] == pytest.approx(-0.05)
    assert table[1, 1].isnan()  # not hunted
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"top k must be in \[1, 3\], got {k}"):
            ranking.top(k)


def test_head_that_no_case_could_judge_comes_last():
    ranking = HeadRanking(head_set("L0H0,L0H1"), torch.tensor([[math.nan], [5.0]]), OBJECTIVES["tracking_error"])
    assert [str(head) for head in ranking.order()] == ["L0H1", "L0H0"]
    assert ranking.to_rows()[1]["mean"] is None


def test_effects_of_a_score_that_is_better_when_higher_are_turned_round():
    trials = table_trials(torch.tensor([[1.0, 3.0], [-2.0, -2.0]]), objective=OBJECTIVES["reward"])
    ranking = rank_heads(trials, HUNT.guidance)
    assert ranking.effects.tolist() == [[-1.0, -3.0], [2.0, 2.0]]
    assert ranking.label == "unguided minus reward (log-odds)"
    assert str(ranking.order()[0]) == "L0H0"


def test_unknown_head_is_named_before_work_starts():
    trials = table_trials(torch.zeros(3, 4))
    for search in ("exhaustive", "race"):
        with pytest.raises(ValueError, match="head L99H0 does not exist"):
            hunt_heads(trials, dataclasses.replace(HUNT, search=search), head_set("L0H0,L99H0"))
    with pytest.raises(ValueError, match="2 rounds of top k 2 keep 4 heads, but there are 3"):
        hunt_heads(trials, dataclasses.replace(HUNT, rounds=2))
    assert trials.subject.rows == []


# --- rounds


def published_headhunter(effects, together, k, rounds):
    """Algorithm 1 of HeadHunter on made-up scores: every head of the pool with those chosen, the k best by the mean."""
    chosen, pool = [], list(range(len(effects)))
    for _ in range(rounds):
        means = []
        for head in pool:
            heads = [*chosen, head]
            bonus = -10.0 if together and set(together) <= set(heads) else 0.0
            means.append(effects[heads].sum(0).mean().item() + bonus)
        best = [pool[i] for i in sorted(range(len(pool)), key=lambda i: means[i])[:k]]
        chosen += best
        pool = [head for head in pool if head not in best]
    return [HeadId(0, head) for head in chosen]


@pytest.mark.parametrize("search", ["exhaustive", "race"])
@pytest.mark.parametrize("k, rounds", [(1, 1), (2, 3), (3, 2), (1, 6)])
def test_rounds_are_those_of_the_published_algorithm(search, k, rounds):
    effects = torch.randn(7, 40, generator=torch.Generator().manual_seed(k)) + torch.arange(7.0)[:, None]
    best, worst = HeadId(0, 0), HeadId(0, 6)  # alone the worst, and valuable together: the reason for rounds
    trials = table_trials(effects, together=(best, worst))
    hunt = dataclasses.replace(HUNT, top_k=k, rounds=rounds, search=search)
    found = hunt_heads(trials, hunt)
    assert list(found.picked) == published_headhunter(effects, (0, 6), k, rounds)
    assert len(found.rounds) == rounds and found.ranking.kept == ()
    if rounds > 1 and k > 1:
        assert worst in found.picked[k : 2 * k]


def test_nothing_is_generated_for_heads_already_kept():
    trials = table_trials(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    hunt_heads(trials, dataclasses.replace(HUNT, top_k=2, rounds=2))
    sets = {tuple(h for _, weak in trial.weak for h in weak.heads) for trial, _ in trials.subject.rows}
    assert sorted(map(len, sets)) == [0, *[1] * 5, *[3] * 3]  # unguided once, 5 heads, then the 3 that are left
    assert len(trials.subject.rows) == len(set(trials.subject.rows)) == 9 * 4


# --- power


def test_power_is_computed_from_the_spread_of_a_pilot():
    effects = 0.5 * torch.randn(30, 48, generator=torch.Generator().manual_seed(0))
    trials = table_trials(effects)
    power = pilot_power(trials, HUNT, heads=6, cases=12)
    assert len(trials.subject.rows) == 7 * 12
    assert power.deviation == pytest.approx(0.5, rel=0.3)
    assert (power.heads, power.cases, power.confirmation_cases) == (30, 48, 12)
    small, large = power.to_rows([0.1, 0.4])
    assert small["cases_to_find"] > small["cases_to_confirm"] > large["cases_to_confirm"]
    assert large["cases_to_find"] == math.ceil(small["cases_to_find"] / 16) or large["cases_to_find"] > 2
    with pytest.raises(ValueError, match="at least 2 cases"):
        pilot_power(trials, HUNT, cases=1)


def test_hunt_finds_the_effects_that_its_power_promises():
    power = Power(deviation=1.0, heads=20, cases=100, confirmation_cases=100)
    generator, seen = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        effects = torch.randn(20, 100, generator=generator)
        effects[5] -= power.smallest_seen
        rows = HeadRanking(head_set([(0, i) for i in range(20)]), effects, OBJECTIVES["tracking_error"]).to_rows()
        seen += next(row["p_all_heads"] for row in rows if row["head"] == "L0H5") < 0.05
    assert seen >= 33  # 36 expected of 40 at a power of 0.9


def test_heads_to_study_come_from_names_then_the_run_then_the_committed_hunt(tmp_path):
    (tmp_path / "hunt").mkdir()
    write_json(tmp_path / "hunt" / "hunted.json", [dict(head="L5H5")])
    folder = tmp_path / "model"
    assert hunted_heads("L1H0,L0H1", [dict(head="L2H2")], folder) == head_set("L0H1,L1H0")
    assert hunted_heads("", [dict(head="L2H2")], folder) == head_set("L2H2")
    assert hunted_heads("", None, folder) == head_set("L5H5")
    with pytest.raises(ValueError, match=r"hunted\.json does not exist"):
        hunted_heads("", None, tmp_path / "elsewhere" / "model")
