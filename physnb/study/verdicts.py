"""Each hypothesis of the plan held against the tables of the study: holds, refuted, undecided, and the numbers why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from physnb.study.plan import HYPOTHESES, LIKELIHOOD, MIXED, MOTION, NEGLIGIBLE, PRESENCE, WORTHWHILE, Hypothesis

Tables = Mapping[str, Sequence[Mapping[str, Any]]]
HOLDS, REFUTED, UNDECIDED = "holds", "refuted", "undecided"


@dataclass(frozen=True)
class Verdict:
    """What became of a hypothesis; numbers: the estimates that decided, in words."""

    hypothesis: Hypothesis
    verdict: str
    numbers: str

    def to_row(self) -> dict[str, str]:
        """For a table."""
        h = self.hypothesis
        return dict(name=h.name, claim=h.claim, verdict=self.verdict, numbers=self.numbers, table=h.table)


def judge(tables: Tables) -> list[Verdict]:
    """The verdict on every hypothesis whose table is there, in the order of the plan."""
    return [Verdict(h, *DECIDE[h.name](tables)) for h in HYPOTHESES if h.table in tables]


def said(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """`-0.074 [-0.095, -0.055]`."""
    if estimate["mean"] is None:
        return "not judged"
    mean, low, high = (f"{estimate[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def side(estimates: Sequence[Mapping[str, Any]], *, above: float = 0.0) -> str:
    """HOLDS where every interval lies above a value, REFUTED where any lies below it, else UNDECIDED."""
    if any(e["mean"] is None for e in estimates):
        return UNDECIDED
    if all(e["low"] > above for e in estimates):
        return HOLDS
    return REFUTED if any(e["high"] < above for e in estimates) else UNDECIDED


def below(estimate: Mapping[str, Any]) -> str:
    """HOLDS where the interval lies below 0, REFUTED where it lies above."""
    if estimate["mean"] is None:
        return UNDECIDED
    return HOLDS if estimate["high"] < 0 else REFUTED if estimate["low"] > 0 else UNDECIDED


def row_of(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """The one row with these entries."""
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows have {wanted}, not one; make the table anew")
    return found[0]


def aim(tables: Tables, part: str = "final") -> tuple[str, str]:
    best = row_of(tables[part], role="best set")
    change = best["relative"][MOTION]
    numbers = f"{best['method']} ({best['heads']}; {best['setting']}): {said(change)} of the unguided error"
    if change["low"] > -NEGLIGIBLE and change["high"] < NEGLIGIBLE:
        return REFUTED, f"{numbers}: a well-powered no"
    if change["high"] < 0 and change["mean"] <= -WORTHWHILE:
        return HOLDS, numbers
    return (REFUTED if change["low"] > -WORTHWHILE else UNDECIDED), numbers


def against(tables: Tables, role: str, part: str = "final") -> tuple[str, str]:
    rows = tables[part]
    other = row_of(rows, role=role)["method"]
    difference = row_of(rows, role="best set")[f"against {other}"][MOTION]
    return below(difference), f"against {other}: {said(difference)} units/s"


def presence_first(tables: Tables) -> tuple[str, str]:
    found = [r for r in tables["final"] if r["method"].startswith("hunted: ") and r["method"].endswith("by tracking")]
    row = max(found, key=lambda r: len(r["heads"]) or 99)  # the set, not its first head
    motion, presence = row["relative"][MOTION], row[PRESENCE]["difference"]
    numbers = f"{row['method']}: missing {said(presence)}, velocity error {said(motion)} of the unguided one"
    if motion["high"] < 0:
        return REFUTED, numbers
    within = motion["low"] > -NEGLIGIBLE and motion["high"] < NEGLIGIBLE
    return (HOLDS if within and presence["high"] < 0 else UNDECIDED), numbers


def price(tables: Tables) -> tuple[str, str]:
    difference = row_of(tables["final_id"], role="best set")[MOTION]["difference"]
    return side([difference]), f"{said(difference)} units/s in distribution"


def few_steps(tables: Tables) -> tuple[str, str]:
    row = row_of(tables["steps"], objective=MIXED)
    return side([row["agreement"]], above=0.7), f"{row['few']} and {row['many']} steps: {said(row['agreement'], 2)}"


def one_head(tables: Tables) -> tuple[str, str]:
    head = dict(found_by=MIXED, judged_by=MOTION, head="L2H0")
    if not any(head.items() <= row.items() for row in tables["heads"]):
        return UNDECIDED, "the model has no such head"
    fresh = row_of(tables["heads"], **head)["fresh"]
    return below(fresh), f"{said(fresh)} units/s"


def kinds_agree(tables: Tables) -> tuple[str, str]:
    rows = [row_of(tables["kinds"], objective=MIXED, first="identity", second=kind)["agreement"]
            for kind in ("uniform", "mean_query", "blur", "zero")]  # fmt: skip
    ceiling = row_of(tables["kinds"], objective=MIXED, first="identity", second="halves")["agreement"]
    return side(rows), f"{'; '.join(said(row, 2) for row in rows)} (identity with itself {said(ceiling, 2)})"


def objectives_agree(tables: Tables) -> tuple[str, str]:
    rows = [row_of(tables["objectives"], first=MIXED, second=name)["agreement"] for name in ("reward", LIKELIHOOD)]
    return side(rows), f"reward {said(rows[0], 2)}; PPE {said(rows[1], 2)}"


def hunts_repeat(tables: Tables) -> tuple[str, str]:
    shared = [row["shared"] for row in tables["repetitions"] if row["objective"] == MIXED]
    low = [s["p"] < 0.05 for s in shared]
    numbers = ", ".join(f"{s['shared']} (p {s['p']:.3f})" for s in shared)
    verdict = HOLDS if all(low) else UNDECIDED if any(low) else REFUTED
    return verdict, f"shared of {shared[0]['chosen']}: {numbers}; chance {shared[0]['expected']:.1f}"


def transferred(tables: Tables, target: str) -> Mapping[str, Any]:
    return row_of(tables["transfer"], hunted_on="worlds", tested_on=target)["against_random"]


def transfer(tables: Tables) -> tuple[str, str]:
    difference = transferred(tables, "phenomena")
    return below(difference), f"against random heads {said(difference)} units"


def another_training(tables: Tables) -> tuple[str, str]:
    if not any(row["tested_on"] == "another training" for row in tables["transfer"]):
        return UNDECIDED, "no other training was given"
    difference = transferred(tables, "another training")
    verdict = {HOLDS: REFUTED, REFUTED: REFUTED, UNDECIDED: HOLDS}[below(difference)]
    return verdict, f"against random heads {said(difference)} units"


def attention(tables: Tables) -> tuple[str, str]:
    correlation = row_of(tables["attention"], head="all", statistic="following", objective=MIXED)["correlation"]
    return below(correlation), said(correlation, 2)


def first_set_again(tables: Tables) -> tuple[str, str]:
    row = row_of(tables["wider"], role="first best set")
    return below(row[MOTION]["difference"]), f"{said(row['relative'][MOTION])} of the unguided error"


def pull(tables: Tables) -> tuple[str, str]:
    unguided, best = (row_of(tables["pull"], role=role) for role in ("unguided", "best set"))
    wanted = [(unguided[name], 1) for name in ("slow", "fast")]
    wanted += [(best[name]["difference"], -1) for name in ("slow", "fast")]
    # One side of zero for all four: the mirror image of a difference that ought to be below it.
    turned = [e if sign > 0 else dict(mean=-e["mean"], low=-e["high"], high=-e["low"]) for e, sign in wanted]
    numbers = "; ".join(
        f"{name} discs: {said(unguided[name])} units/s unguided, {said(best[name]['difference'])} by guidance"
        for name in ("slow", "fast")
    )
    return side(turned), numbers


DECIDE: dict[str, Callable[[Tables], tuple[str, str]]] = {
    "aim": aim,
    "better than random": lambda tables: against(tables, "random"),
    "better than controls": lambda tables: against(tables, "best control"),
    "presence first": presence_first,
    "price": price,
    "few steps": few_steps,
    "one head": one_head,
    "kinds agree": kinds_agree,
    "objectives agree": objectives_agree,
    "hunts repeat": hunts_repeat,
    "transfer": transfer,
    "another training": another_training,
    "attention": attention,
    "aim, wider choice": lambda tables: aim(tables, "wider"),
    "better than random, wider choice": lambda tables: against(tables, "random", "wider"),
    "better than controls, wider choice": lambda tables: against(tables, "best control", "wider"),
    "better than one step": lambda tables: against(tables, "one step", "wider"),
    "first set again": first_set_again,
    "pull": pull,
}
