"""Compare arms on the same prompts and seeds, with intervals from a bootstrap over prompts."""

from collections.abc import Iterable

import numpy as np

Array = np.ndarray
Interval = dict[str, float]  # "value", "low", "high"
Pairs = Iterable[tuple[str, str]]  # names of arms: ours, theirs


def bootstrap_ratio(top: Array, bottom: Array, clusters: list[str], draws: int = 4000) -> Interval:
    """Compute sum(top) / sum(bottom) with a 95 % percentile interval; NaN where bottom is 0.

    top, bottom (n,): one entry per image. Images of one caption are not independent, so whole
    captions (`clusters`) are drawn again, not images. A mean is the ratio to ones; a win rate is
    wins to wins plus losses.
    """
    index, drawn = _draw_clusters(clusters, draws)
    tops, bottoms = np.bincount(index, top), np.bincount(index, bottom)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _interval(top.sum() / bottom.sum(), (drawn @ tops) / (drawn @ bottoms))


def _draw_clusters(clusters: list[str], draws: int) -> tuple[Array, Array]:
    """Return the cluster of each image (n,), and how often each is drawn (draws, clusters)."""
    _, index = np.unique(clusters, return_inverse=True)
    count = index.max() + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws)
    return index, drawn


def _interval(value: float, drawn: Array) -> Interval:
    """Add the 95 % percentile interval of drawn values (draws,)."""
    low = high = np.nan
    if np.isfinite(drawn).any():
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def mean_interval(values: Array, clusters: list[str]) -> Interval:
    """Compute the mean of per-image values or paired differences (n,), with its interval."""
    return bootstrap_ratio(values.astype(float), np.ones(len(values)), clusters)


def win_rate(ours: Array, theirs: Array, clusters: list[str]) -> Interval:
    """Compute how often ours (n,) scores higher where the two differ, `decided` times."""
    wins, decided = (ours > theirs).astype(float), (ours != theirs).astype(float)
    return bootstrap_ratio(wins, decided, clusters) | {"decided": int(decided.sum())}


def win_rates(scores: dict[str, Array], clusters: list[str], pairs: Pairs) -> dict[str, Interval]:
    """Compute the win rates of pairs of arms; None for numbers of nothing decided, as in JSON."""
    rates = {}
    for ours, theirs in pairs:
        rate = win_rate(scores[ours], scores[theirs], clusters)
        if not rate["decided"]:
            rate |= dict.fromkeys(("value", "low", "high"))
        rates[f"{ours}_vs_{theirs}"] = rate
    return rates


def differences(scores: dict[str, Array], clusters: list[str], pairs: Pairs) -> dict[str, Interval]:
    """Compute the mean differences of pairs of arms."""
    gains = {}
    for ours, theirs in pairs:
        gain = scores[ours] - scores[theirs]
        gains[f"{ours}_minus_{theirs}"] = mean_interval(gain, clusters)
    return gains


def paired_shares(ours: Array, theirs: Array, clusters: list[str]) -> dict:
    """Compare two arms, right or wrong (n,) on the same prompts and seeds.

    {"share", "difference"}: that of ours, and ours minus theirs, with intervals; {"fixed",
    "broken"}: how many are right in ours only, and in theirs only. Their difference over n is
    "difference", which alone would hide how many images break.
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    return {
        "share": mean_interval(ours, clusters),
        "difference": mean_interval(1.0 * ours - theirs, clusters),
        "fixed": int((ours & ~theirs).sum()),
        "broken": int((theirs & ~ours).sum()),
    }


def ranking_interval(
    scores: Array, right: Array, clusters: list[str], draws: int = 2000
) -> Interval:
    """Compute how often a right image scores above a wrong one, a tie counting half; (n,) each.

    This is the area under the ROC curve, with its interval as in `bootstrap_ratio`; NaN unless
    there are both kinds.
    """
    right = np.asarray(right, bool)
    high, low = scores[right][:, None], scores[~right]
    above = ((high > low) + 0.5 * (high == low)).astype(np.float32)  # (right, wrong)
    index, drawn = _draw_clusters(clusters, draws)
    times = drawn.astype(np.float32)[:, index]  # how often each image is drawn, (draws, n)
    ours, theirs = times[:, right], times[:, ~right]
    with np.errstate(invalid="ignore", divide="ignore"):
        areas = ((ours @ above) * theirs).sum(1) / (ours.sum(1) * theirs.sum(1))
        return _interval(above.sum() / above.size, areas)


def said(interval: Interval, form: str = ".3f") -> str:
    """Format a number with its interval; the form "+.3f" is for differences."""
    return f"{interval['value']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def said_wins(rate: Interval, form: str = ".3f") -> str:
    """Format a win rate with the number of comparisons that were decided."""
    decided = rate["decided"]
    return f"{said(rate, form)} of {decided}" if decided else "all tied"
