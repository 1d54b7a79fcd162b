import pytest
import torch
from subjects_for_tests import table_trials

from physnb.config import HuntConfig
from physnb.contributions import both_ways_mean, measure_contributions, sampled_orders
from physnb.statistics import bootstrap_mean

HUNT = HuntConfig()
EFFECTS = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def contributions(together=(), heads="L0H0,L0H1,L0H2", **settings):
    return measure_contributions(table_trials(EFFECTS, together=together), HUNT, heads, **settings)


def test_orders_come_with_their_reverse_and_only_in_pairs():
    orders = sampled_orders(5, 4)
    assert orders[1] == orders[0][::-1] and orders[3] == orders[2][::-1] and orders == sampled_orders(5, 4)
    assert all(sorted(order) == list(range(5)) for order in orders)
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match="orders come in pairs"):
            sampled_orders(5, count)
    with pytest.raises(ValueError, match="no head"):
        sampled_orders(0, 2)


def test_heads_that_only_add_up_contribute_their_own_effect_whichever_way_it_is_asked():
    found = contributions()
    for number in range(3):
        for values in (found.alone, found.leave_one_out, found.marginals.mean(0)):
            torch.testing.assert_close(values[number], EFFECTS[number], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.together, EFFECTS[:3].sum(0), atol=1e-5, rtol=0)


def test_heads_that_need_each_other_share_what_only_both_can_do():
    found = contributions("L0H0,L0H1")
    plain = contributions()
    gain = (found.marginals - plain.marginals).mean((0, 2))
    # in an order and its reverse each of the two comes last once, whatever the third does
    assert gain.tolist() == pytest.approx([-5.0, -5.0, 0.0], abs=1e-4)
    assert (found.alone - plain.alone).abs().max() == 0
    lost = (found.leave_one_out - plain.leave_one_out).mean(1)
    assert lost.tolist() == pytest.approx([-10.0, -10.0, 0.0], abs=1e-4)


def test_shapley_values_sum_to_the_whole_in_every_order():
    found = contributions("L0H0,L0H2", orders=4)
    for marginals in found.marginals:
        torch.testing.assert_close(marginals.sum(0), found.together, atol=1e-4, rtol=0)
    total = sum(row["shapley"]["mean"] for row in found.to_rows())
    assert total == pytest.approx(float(found.together.mean()), abs=1e-4)


def test_every_set_is_measured_once_and_some_cases_will_do():
    trials = table_trials(EFFECTS)
    found = measure_contributions(trials, HUNT, "L0H0,L0H1,L0H2", orders=20, cases=[1, 5])
    assert trials.rows_run == 2 * 2**3  # all subsets, the empty one being no guidance
    torch.testing.assert_close(found.alone, EFFECTS[:3, [1, 5]])


def test_rows_name_heads_and_estimates():
    rows = contributions().to_rows()
    assert [row["head"] for row in rows] == ["L0H0", "L0H1", "L0H2"]
    assert rows[0]["alone"] == bootstrap_mean(EFFECTS[0]).to_dict()
    assert rows[0]["shapley"]["low"] < rows[0]["shapley"]["mean"] < rows[0]["shapley"]["high"]


def test_interval_resamples_cases_and_orders():
    cases = torch.randn(30, generator=torch.Generator().manual_seed(1))
    alike = both_ways_mean(cases.expand(6, -1))
    plain = bootstrap_mean(cases)
    assert alike.mean == pytest.approx(plain.mean)
    assert alike.high - alike.low == pytest.approx(plain.high - plain.low, rel=0.1)  # orders say nothing
    apart = cases + torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0])[:, None]
    assert both_ways_mean(apart).high - both_ways_mean(apart).low > 2 * (alike.high - alike.low)


def test_case_that_some_order_could_not_judge_is_left_out():
    values = torch.ones(4, 3)
    values[2, 1] = torch.nan
    found = both_ways_mean(values)
    assert (found.mean, found.judged, found.cases) == (1.0, 2, 3)
    assert both_ways_mean(torch.full((2, 3), torch.nan)).judged == 0


def test_bad_heads_are_named():
    with pytest.raises(ValueError, match="head L0H9 does not exist"):
        contributions(heads="L0H9")
