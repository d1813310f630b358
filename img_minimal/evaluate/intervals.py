"""Compare arms on the same prompts and seeds, with intervals from a bootstrap over prompts."""

from collections.abc import Iterable

import numpy as np

Array = np.ndarray
Interval = dict[str, float]  # "value", "low", "high"


def bootstrap_ratio(top: Array, bottom: Array, clusters: Iterable[str]) -> Interval:
    """Compute sum(top) / sum(bottom) with a 95 % percentile interval; NaN where bottom is 0.

    top, bottom (n,): one entry per image. Images of one caption are not independent, so whole
    captions (`clusters`) are drawn again, not images. A mean is the ratio to ones; a win rate is
    wins to wins plus losses.
    """
    index, drawn = draw_clusters(clusters, 4000)
    tops, bottoms = np.bincount(index, top), np.bincount(index, bottom)
    with np.errstate(invalid="ignore", divide="ignore"):
        return with_interval(top.sum() / bottom.sum(), (drawn @ tops) / (drawn @ bottoms))


def draw_clusters(clusters: Iterable[str], draws: int) -> tuple[Array, Array]:
    """Return the cluster of each image (n,), and how often each is drawn (draws, clusters)."""
    _, index = np.unique(clusters, return_inverse=True)
    count = index.max() + 1
    return index, np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)


def with_interval(value: float, drawn: Array) -> Interval:
    """Add the 95 % percentile interval of drawn values (draws,)."""
    low = high = np.nan
    if np.isfinite(drawn).any():
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def mean_interval(values: Array, clusters: Iterable[str]) -> Interval:
    """Compute the mean of per-image values or paired differences (n,), with its interval."""
    return bootstrap_ratio(values.astype(float), np.ones(len(values)), clusters)


def win_rate(ours: Array, theirs: Array, clusters: Iterable[str]) -> Interval:
    """Compute how often ours (n,) scores higher where the two differ, `decided` times.

    Numbers of nothing decided are None, as in JSON.
    """
    decided = ours != theirs
    rate = dict.fromkeys(("value", "low", "high"))
    if decided.any():
        rate = bootstrap_ratio((ours > theirs).astype(float), decided.astype(float), clusters)
    return rate | {"decided": int(decided.sum())}


def shares(hits: Array, groups: dict[str, Array], chosen: Array | bool = True) -> dict[str, float]:
    """Average hits (n,) over the `chosen` images (n,) of every group (n,) that has any."""
    means = {}
    for name, group in groups.items():
        if (group & chosen).any():
            means[name] = hits[group & chosen].mean().item()
    return means


def compare_arms(
    marks: dict[str, dict[str, Array]],
    wins: dict[str, str],
    groups: dict[str, Array],
    clusters: Iterable[str],
) -> dict:
    """Score every arm, overall and in each group (n,) of prompts, and compare IMG with the others.

    marks: {mark: {arm: (n,)}}; of the first one are intervals, groups and differences. `wins` names
    win rates, and the mark that each one compares.
    """
    scores, arms = next(iter(marks.values())), {}
    results = {"arms": arms, "difference": {}} | {rate: {} for rate in wins}
    for name, values in scores.items():
        arms[name] = {mark: by_arm[name].mean().item() for mark, by_arm in marks.items()}
        arms[name]["n"] = len(values)
        arms[name]["interval"] = mean_interval(values, clusters)
        arms[name]["by_category"] = shares(values, groups)
        if name == "img":
            continue
        gain = scores["img"] - values
        results["difference"][f"img_minus_{name}"] = mean_interval(gain, clusters)
        for rate, mark in wins.items():
            pair = marks[mark]["img"], marks[mark][name]
            results[rate][f"img_vs_{name}"] = win_rate(*pair, clusters)
    return results


def paired_shares(ours: Array, theirs: Array, clusters: Iterable[str]) -> dict:
    """Compare two arms, right or wrong (n,) on the same prompts and seeds.

    {"share", "difference"}: that of ours, and ours minus theirs, with intervals; {"fixed",
    "broken"}: how many are right in ours only, and in theirs only. Their difference over n is
    "difference", which alone would hide how many images break.
    """
    gain = np.subtract(ours, theirs, dtype=float)
    return {
        "share": mean_interval(ours, clusters),
        "difference": mean_interval(gain, clusters),
        "fixed": int((gain > 0).sum()),
        "broken": int((gain < 0).sum()),
    }


def said(interval: Interval, form: str = ".3f") -> str:
    """Format a number with its interval; the form "+.3f" is for differences."""
    return f"{interval['value']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def said_wins(rate: Interval) -> str:
    """Format a win rate with the number of comparisons that were decided."""
    decided = rate["decided"]
    return f"{said(rate)} of {decided}" if decided else "all tied"
