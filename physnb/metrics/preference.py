"""Preference: strengths of methods from pairwise choices, and a small reward model that learns from the same choices.

The reward sees frames alone, never the true state. Before any human choice it can learn from automatic pairs, a lawful
clip against a broken one. Whether those help, and how many choices are needed: learning_curve, with a simulated person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from torch import Tensor

from physnb.config import choose, require
from physnb.data import Clip
from physnb.metrics.scores import Scores, scores
from physnb.metrics.violations import MIN_FRAMES, VIOLATIONS, measure_violations
from physnb.statistics import bootstrap_mean
from physnb.store import read_json, read_tensors, write_json, write_tensors, written_whole

# --- strengths from choices

LEFT_SHARE = {"left": 1.0, "tie": 0.5, "right": 0.0}  # what an answer gives the left side; a skip gives nothing
RESAMPLE_UNITS = ("pair", "rater")
NEWTON_STEPS = 200


@dataclass(frozen=True)
class Strengths:
    """Bradley-Terry strengths (log-odds, mean 0) with 95 % intervals, from `choices` answers besides the skips."""

    items: tuple[str, ...]
    values: Float[np.ndarray, " item"]
    low: Float[np.ndarray, " item"]
    high: Float[np.ndarray, " item"]
    choices: int
    skipped: int

    def to_table(self) -> pd.DataFrame:
        """One row an item, strongest first."""
        columns = dict(item=self.items, strength=self.values, low=self.low, high=self.high)
        return pd.DataFrame(columns).sort_values("strength", ascending=False, ignore_index=True)


def fit_strengths(wins: Float[np.ndarray, "*resample item item"]) -> Float[np.ndarray, "*resample item"]:
    """Strengths s (log-odds, mean 0) that maximise sum_ij wins_ij log sigma(s_i - s_j) (Bradley and Terry 1952).

    wins[..., i, j]: how often i beat j; fractions are allowed. The problem is convex; Newton's step is shortened so
    that no difference changes by more than 1, which makes every step an improvement (Bach 2010, proposition 1).
    Raises ValueError unless the wins lead from every item to every other, directly or not (Ford 1957): otherwise some
    strengths are infinite, or two groups were never compared.
    """
    wins = np.asarray(wins, dtype=np.float64)
    items = wins.shape[-1]
    require(
        wins.ndim >= 2 and wins.shape[-2] == items >= 2, f"wins must be [item, item] of 2 or more, got {wins.shape}"
    )
    require(bool((np.isfinite(wins) & (wins >= 0)).all()), "wins must be finite and not negative")
    flat = wins.reshape(-1, items, items) * (1 - np.eye(items))
    for matrix in np.unique(flat > 0, axis=0):  # bootstrap samples share a few patterns
        groups, _ = connected_components(matrix, connection="weak")
        require(groups == 1, f"the items fall into {groups} groups that were never compared; add pairs between them")
        groups, _ = connected_components(matrix, connection="strong")
        require(groups == 1, "an item, or a group, won or lost every comparison with the rest; pass prior_wins > 0")
    games, values = flat + flat.swapaxes(1, 2), np.zeros(flat.shape[:2])
    for _ in range(NEWTON_STEPS):
        chance = expit(values[:, :, None] - values[:, None])
        slope = (flat - games * chance).sum(2)
        curvature = games * chance * (1 - chance)
        hessian = curvature.sum(2)[:, :, None] * np.eye(items) - curvature
        # The mean of the strengths is free, and 1 / items pins it.
        step = np.linalg.solve(hessian + 1 / items, slope[..., None])[..., 0]
        values = values + step / np.maximum(np.ptp(step, axis=1, keepdims=True), 1)
        if np.abs(step).max() < 1e-8:
            return (values - values.mean(1, keepdims=True)).reshape(wins.shape[:-1])
    raise RuntimeError(f"strengths did not converge in {NEWTON_STEPS} steps")


def bradley_terry(
    choices: pd.DataFrame,
    *,
    left: str = "left_method",
    right: str = "right_method",
    resample: str = "pair",
    prior_wins: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> Strengths:
    """Strength of every item in the columns `left` and `right`, with 95 % bootstrap intervals over pairs or raters.

    choices: as ChoiceStore.read gives them, with `answer` (left, right, tie, skip) and the column named by `resample`.
    A tie is half a win each. prior_wins: pseudo-wins added each way between any two items that were compared; 1/2
    keeps an item that always wins finite (for two items: the correction of Haldane and of Anscombe, 1956) and pulls
    strengths together a little. 0 is maximum likelihood, which raises where an item, or a group, always wins, in a
    bootstrap sample too.
    Raises ValueError for no counted choice, unknown answers, items never compared, or fewer than 2 units to resample.
    Leaves out a parameter for ties (Davidson 1970), rater effects and position bias. Intervals over pairs hold for
    these raters; intervals over raters need many of them.
    """
    choose("resample", resample, RESAMPLE_UNITS)
    require(prior_wins >= 0 and resamples >= 100, "prior_wins must not be negative and resamples at least 100")
    missing = [name for name in (left, right, "answer", resample) if name not in choices]
    require(not missing, f"the table of choices has no column {', '.join(missing)}")
    for answer in choices["answer"].unique():
        choose("answer", answer, (*LEFT_SHARE, "skip"))
    counted = choices[choices["answer"] != "skip"]
    require(len(counted) > 0, "no choice is counted yet; every answer is a skip, or there is none")
    require(not counted[[left, right, resample]].isna().any(axis=None), "a choice lacks an item or its " + resample)
    require(bool((counted[left] != counted[right]).all()), "a choice is between an item and itself")
    codes, names = pd.factorize(pd.concat([counted[left], counted[right]]), sort=True)
    first, second = codes.reshape(2, -1)
    units, labels = pd.factorize(counted[resample])
    require(len(labels) >= 2, f"an interval over {resample}s needs at least 2 of them, got {len(labels)}")

    share = counted["answer"].map(LEFT_SHARE).to_numpy(dtype=float)
    by_unit = np.zeros((len(labels), len(names), len(names)))
    np.add.at(by_unit, (units, first, second), share)
    np.add.at(by_unit, (units, second, first), 1 - share)
    wins = by_unit.sum(0)
    prior = prior_wins * (wins + wins.T > 0)
    draws = np.random.default_rng(seed).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), resamples)
    resampled = (draws @ by_unit.reshape(len(labels), -1)).reshape(-1, *wins.shape)
    values = fit_strengths(wins + prior)
    try:
        low, high = np.quantile(fit_strengths(resampled + prior), [0.025, 0.975], axis=0)
    except ValueError as error:
        raise ValueError(f"too few choices for an interval: in a bootstrap sample, {error}") from None
    return Strengths(tuple(map(str, names)), values, low, high, len(counted), len(choices) - len(counted))


# --- the reward

WEIGHTS_FILE, CONFIG_FILE = "reward.safetensors", "reward.json"
PENALTY = 0.3  # of 0.1, 0.3 and 1 never far from the best at 10 to 200 choices of simulated people


@dataclass(frozen=True)
class RewardModel:
    """Reward = weights . violations in log-odds: sigma(difference of two rewards) is the chance to be preferred.

    No weight is above 0: a violation can never earn reward. Linear for the same reason: a small network fitted the
    automatic pairs as well, and then preferred white noise, which it had not met, to every lawful clip.
    pairs: how many it learned from, its prior's included.
    """

    weights: Float[Tensor, " violation"]
    pairs: int

    def __post_init__(self) -> None:
        fits = self.weights.shape == (len(VIOLATIONS),) and bool(((self.weights <= 0) & self.weights.isfinite()).all())
        require(fits, f"a reward has {len(VIOLATIONS)} finite weights of 0 or below, got {self.weights.tolist()}")

    def save(self, folder: str | Path) -> None:
        """A new folder with the weights as safetensors and what they weigh as JSON, written whole or not at all."""
        require(not Path(folder).exists(), f"reward folder {folder} exists; choose another name or delete it")
        with written_whole(folder) as temporary:
            temporary.mkdir()
            write_tensors(temporary / WEIGHTS_FILE, {"weights": self.weights}, {})
            write_json(temporary / CONFIG_FILE, {"violations": VIOLATIONS, "pairs": self.pairs})

    @staticmethod
    def load(folder: str | Path) -> RewardModel:
        """The reward of a folder; raises ValueError naming a missing file, or one made for other violations."""
        config = read_json(Path(folder) / CONFIG_FILE)
        fits = (
            isinstance(config, dict) and config.get("violations") == VIOLATIONS and isinstance(config.get("pairs"), int)
        )
        require(fits, f"{Path(folder) / CONFIG_FILE} describes other violations; fit the reward again")
        tensors, _ = read_tensors(Path(folder) / WEIGHTS_FILE)
        require("weights" in tensors, f"{Path(folder) / WEIGHTS_FILE} holds no weights; fit the reward again")
        return RewardModel(tensors["weights"], config["pairs"])


UNTRAINED = RewardModel(torch.full((len(VIOLATIONS),), -1.0), 0)  # every violation counts, also one never learned from


def fit_reward(
    left: Float[Tensor, "pair violation"],
    right: Float[Tensor, "pair violation"],
    left_share: Float[Tensor, " pair"],
    *,
    prior: RewardModel = UNTRAINED,
    penalty: float = PENALTY,
) -> RewardModel:
    """The reward whose weights w <= 0 minimise the Bradley-Terry loss of the choices plus penalty / 2 |w - w_prior|^2.

    loss = -sum_pairs [a log sigma(w . d) + (1 - a) log sigma(-w . d)], d = left - right, a = left_share: 1 where left
    was preferred, 0 where right was, 1/2 for a tie. Convex, so no seed matters.
    Raises ValueError for shapes that do not match, NaN (a clip that cannot be judged) or shares outside [0, 1].
    """
    count = len(left_share)
    require(
        left.shape == right.shape == (count, len(VIOLATIONS)),
        f"{count} pairs need two [{count}, {len(VIOLATIONS)}] tables, got {list(left.shape)} and {list(right.shape)}",
    )
    difference, share = (left - right).double().numpy(), left_share.double().numpy()
    broken = int(np.isnan(difference).any(1).sum())
    require(broken == 0, f"{broken} pairs hold a clip that cannot be judged; leave those pairs out")
    require(bool(((share >= 0) & (share <= 1)).all()), "left_share must lie in [0, 1]")
    require(penalty > 0, f"penalty must be above 0, got {penalty}")
    centre = prior.weights.double().numpy()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin, offset = difference @ weights, weights - centre
        value = np.logaddexp(0, margin).sum() - share @ margin + penalty / 2 * offset @ offset
        return value, difference.T @ (expit(margin) - share) + penalty * offset

    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=[(None, 0)] * len(centre))
    if not found.success:
        raise RuntimeError(f"the reward did not converge: {found.message}")
    return RewardModel(torch.from_numpy(found.x).float(), prior.pairs + count)


def pretrain_reward(lawful: Clip, broken: Clip, *, penalty: float = PENALTY) -> RewardModel:
    """The reward learned from automatic pairs: clip i of `lawful` is preferred to clip i of `broken`.

    Pairs with a clip that cannot be judged are left out, so `pairs` of the result may be fewer than were given.
    Raises ValueError if the batches do not match or no pair is left.
    """
    require(
        lawful.frames.shape == broken.frames.shape and lawful.fps == broken.fps,
        f"lawful {tuple(lawful.frames.shape)} and broken {tuple(broken.frames.shape)} clips do not match, or their fps",
    )
    better, worse = measure_violations(lawful), measure_violations(broken)
    judged = ~(better + worse).isnan().any(1)
    require(bool(judged.any()), "in no pair can a disc be followed in both clips; nothing to learn from")
    return fit_reward(better[judged], worse[judged], torch.ones(int(judged.sum())), penalty=penalty)


def pair_choices(
    choices: pd.DataFrame, violations: Mapping[str, Float[Tensor, " violation"]]
) -> tuple[Float[Tensor, "pair violation"], Float[Tensor, "pair violation"], Float[Tensor, " pair"]]:
    """Left and right violations and left_share for fit_reward, one row a choice that is not a skip.

    choices: as ChoiceStore.read gives them; violations: a row of measure_violations by clip id.
    Raises ValueError for a clip that is not among them, or when every choice is a skip.
    """
    counted = choices[choices["answer"] != "skip"]
    require(len(counted) > 0, "no choice is counted yet; every answer is a skip, or there is none")
    unknown = sorted({*counted["left_clip"], *counted["right_clip"]} - violations.keys())
    require(not unknown, f"{len(unknown)} clips have no violations measured, for example {', '.join(unknown[:2])}")
    left, right = (torch.stack([violations[clip] for clip in counted[side]]) for side in ("left_clip", "right_clip"))
    return left, right, torch.tensor([LEFT_SHARE[choose("answer", a, LEFT_SHARE)] for a in counted["answer"]])


def metric_reward(generated: Clip, model: RewardModel) -> Scores:
    """Reward of each clip in log-odds, higher is better, 0 for a clip without any violation.

    Raises ValueError for clips that measure_violations refuses.
    Leaves out all that measure_violations leaves out; a clip in which no disc can be followed is not judged.
    """
    reason = f"no disc is wholly in the box for {MIN_FRAMES} frames in a row"
    found = scores("reward", "log-odds", measure_violations(generated) @ model.weights, reason)
    return replace(found, lower_is_better=False)


def learning_curve(
    left: Float[Tensor, "pair violation"],
    right: Float[Tensor, "pair violation"],
    left_better: Bool[Tensor, " pair"],
    *,
    pretrained: RewardModel | None = None,
    counts: Sequence[int] = (0, 10, 20, 50, 100, 200),
    flip: float = 0.15,
    draws: int = 20,
    penalty: float = PENALTY,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy on unseen pairs by the number of choices learned from, for several starts of the reward.

    The person is simulated: asked for the better clip, it tells the truth (`left_better`) but for a share `flip` of the
    pairs. Each draw picks other pairs to ask about and other slips; accuracy is agreement with the truth on the rest.
    Rows: start ("from nothing": weights 0; "equal weights": UNTRAINED; "automatic pairs": `pretrained`), pairs,
    accuracy with its 95 % interval over draws; equal rewards count 1/2.
    Raises ValueError for fewer than 20 pairs to hold out, flip outside [0, 0.5), or fewer than 2 draws.
    Leaves out everything that sets a person apart from that: taste, fatigue, slips that depend on the pair.
    """
    total = len(left_better)
    require(len(counts) > 0 and min(counts) >= 0, f"counts must be given and not be negative, got {tuple(counts)}")
    require(
        total - max(counts) >= 20, f"{max(counts)} of {total} pairs leave fewer than 20 to hold out; give more pairs"
    )
    require(0 <= flip < 0.5, f"flip must be in [0, 0.5), got {flip}")
    require(draws >= 2, f"an interval needs at least 2 draws, got {draws}")
    starts = {"from nothing": RewardModel(torch.zeros(len(VIOLATIONS)), 0), "equal weights": UNTRAINED}
    starts |= {} if pretrained is None else {"automatic pairs": pretrained}
    truth, random = left_better.float(), np.random.default_rng(seed)
    hits = {(start, count): [] for start in starts for count in counts}
    for _ in range(draws):
        order = torch.from_numpy(random.permutation(total))
        slips = torch.from_numpy(random.random(total) < flip)
        answers, held_out = torch.where(slips, 1 - truth, truth), order[max(counts) :]
        for start, count in hits:
            asked, model = order[:count], starts[start]
            if count > 0:
                model = fit_reward(left[asked], right[asked], answers[asked], prior=model, penalty=penalty)
            margin = (left[held_out] - right[held_out]) @ model.weights
            towards_truth = margin.sign() * (2 * truth[held_out] - 1)  # 1 right, -1 wrong, 0 undecided
            hits[start, count].append(float((1 + towards_truth.mean()) / 2))
    rows = []
    for (start, count), accuracies in hits.items():
        found = bootstrap_mean(torch.tensor(accuracies), seed)
        rows.append(dict(start=start, pairs=count, accuracy=found.mean, low=found.low, high=found.high, draws=draws))
    return pd.DataFrame(rows)
