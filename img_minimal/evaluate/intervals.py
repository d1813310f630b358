"""Intervals for paired comparisons: a bootstrap over prompts."""

import numpy as np


def bootstrap_ratio(
    top: np.ndarray, bottom: np.ndarray, clusters: list[str], draws: int = 4000, seed: int = 0
) -> dict[str, float]:
    """sum(top) / sum(bottom) with a 95 % percentile interval: {"value", "low", "high"}; NaN where bottom is empty.

    top, bottom (n,): one entry per image. Images of one caption are not independent, so whole captions (`clusters`)
    are drawn again, not images. A mean is the ratio to ones; a win rate is wins to wins plus losses.
    """
    _, index = np.unique(clusters, return_inverse=True)
    count = index.max() + 1
    tops, bottoms = np.bincount(index, top, count), np.bincount(index, bottom, count)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)  # (draws, clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (drawn @ tops) / (drawn @ bottoms)
        value = top.sum() / bottom.sum()
        low, high = np.nanpercentile(ratios, [2.5, 97.5]) if np.isfinite(ratios).any() else (np.nan, np.nan)
    return {"value": float(value), "low": float(low), "high": float(high)}


def mean_interval(values: np.ndarray, clusters: list[str]) -> dict[str, float]:
    """The mean of per-image values or paired differences (n,), with its interval."""
    return bootstrap_ratio(values.astype(float), np.ones(len(values)), clusters)


def paired_shares(ours: np.ndarray, theirs: np.ndarray, clusters: list[str]) -> dict:
    """Two arms, right or wrong (n,) on the same prompts and seeds.

    {"share", "difference"}: that of ours, and ours minus theirs, with intervals; {"fixed", "broken"}: how many are
    right in ours only, and in theirs only. Their difference over n is "difference", so it hides nothing to give both.
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    return {
        "share": mean_interval(ours, clusters),
        "difference": mean_interval(1.0 * ours - theirs, clusters),
        "fixed": int((ours & ~theirs).sum()),
        "broken": int((theirs & ~ours).sum()),
    }


def win_rate(ours: np.ndarray, theirs: np.ndarray, clusters: list[str]) -> dict[str, float]:
    """How often ours scores higher, of the images where the two differ, with its interval; `decided` counts those."""
    wins, losses = (ours > theirs).astype(float), (ours < theirs).astype(float)
    return bootstrap_ratio(wins, wins + losses, clusters) | {"decided": int((wins + losses).sum())}


def ranking_interval(
    scores: np.ndarray, right: np.ndarray, clusters: list[str], draws: int = 2000, seed: int = 0
) -> dict[str, float]:
    """How often a right image scores above a wrong one, a tie counting half (the area under the ROC curve), (n,) each.

    With a 95 % percentile interval over clusters, as `bootstrap_ratio` has it; NaN unless there are both kinds.
    """
    _, index = np.unique(clusters, return_inverse=True)
    right = np.asarray(right, bool)
    high, low = scores[right][:, None], scores[~right][None]
    above = ((high > low) + 0.5 * (high == low)).astype(np.float32)  # (right, wrong)
    count = index.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float32)
    ours, theirs = drawn[:, index[right]], drawn[:, index[~right]]  # how often each image was drawn
    with np.errstate(invalid="ignore", divide="ignore"):
        areas = ((ours @ above) * theirs).sum(1) / (ours.sum(1) * theirs.sum(1))
    if not np.isfinite(areas).any():
        return {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    ends = np.nanpercentile(areas, [2.5, 97.5])
    return {"value": float(above.mean()), "low": float(ends[0]), "high": float(ends[1])}


def said(interval: dict, form: str = ".3f") -> str:
    """A number with its interval; the form "+.3f" is for differences."""
    return f"{interval['value']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"
