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


def win_rate(ours: np.ndarray, theirs: np.ndarray, clusters: list[str]) -> dict[str, float]:
    """How often ours scores higher, of the images where the two differ, with its interval; `decided` counts those."""
    wins, losses = (ours > theirs).astype(float), (ours < theirs).astype(float)
    return bootstrap_ratio(wins, wins + losses, clusters) | {"decided": int((wins + losses).sum())}
