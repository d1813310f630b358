"""The Iteratively Updated Preference Objective (Eqs. 4-7 and 15-19): the aligner's loss.

    f        f(c)       the aligner's answer for the non-preferred image
    f_ref    f_ref(c)   the answer of a frozen earlier copy of the aligner
    c_w      winner     image tokens of the preferred image
    c_l      loser      image tokens of the non-preferred image

All are (B, N, D). With D(a) = ||a - f||^2 - ||a - f_ref||^2 and l(x) = log(1 + exp(-x)):

    L_base = ||c_w - f||^2                                                           Eq. 4
    L_pref = l( -[ (D(c_w) - D(c_l))  +  (D(c_w) - ||f_ref - f||^2) ] )              Eqs. 5-7, 15-17
                   DPO: prefer c_w       SPIN: prefer c_w to
                   to c_l                one's own earlier answer
    L = L_base + lambda * L_pref

The terms quadratic in f cancel (2 - 1 - 1 = 0), so the argument of l is *affine* in f. Its gradient
points along 2 c_w - c_l - f_ref wherever f is: away from the loser and from the earlier answer. How
far to go is left to l. With f_ref = f the argument is 0 and l' = 1/2, so that f comes to rest where
2 (f - c_w) = lambda (2 c_w - c_l - f), *beyond* the winner:

    f = c_w + lambda / (2 + lambda) (c_w - c_l)           DPO alone: c_w + lambda / 2 (c_w - c_l)

Whether a step that long pays is not up to the loss. `best_length` measures it.
"""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from img_minimal.aligner import check_count, check_shapes


def squared_distance(a: Tensor, b: Tensor, norm: str = "mean") -> Tensor:
    """Compute ||a - b||^2 per sample in at least fp32: (B, ...) x 2 -> (B,).

    `norm` averages or sums over elements. The paper leaves this open, and it sets how fast l
    saturates: summed over 16 x 2048 elements, any difference is a large one. Raises ValueError for
    another `norm`, or tensors of two shapes.
    """
    check_shapes("bnd bnd", a, b)
    if norm not in ("mean", "sum"):
        raise ValueError(f"norm is {norm!r}, expected 'mean' or 'sum'")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    squares = (a.to(dtype) - b.to(dtype)).square().flatten(1)
    return squares.mean(1) if norm == "mean" else squares.sum(1)


def preference_loss(
    f: Tensor,
    f_ref: Tensor | None,
    c_w: Tensor,
    c_l: Tensor,
    *,
    weight: float = 1.0,
    dpo: bool = True,
    spin: bool = True,
    norm: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute L_base + weight * L_pref, averaged over the batch: (loss (), metrics).

    `dpo` and `spin` select the parts of L_pref. Without both, or without `f_ref`, the loss is
    L_base alone; without `f_ref`, `error` is the only metric.

    Metrics are detached scalars. `error` ||c_w - f||^2 and `reference_error` ||c_w - f_ref||^2 are
    means over elements whatever `norm` is, as every error in a log. `margin` is the mean argument
    of l, `implicit_accuracy` the share of samples where it is positive; both take the full
    argument, so that runs with and without a part compare. Raises ValueError for an unknown `norm`,
    tensors of several shapes, or a `weight` that is no finite number.
    """
    check_shapes("bnd bnd bnd bnd", f, c_w, c_l, f_ref)
    if not (isinstance(weight, Real) and 0 <= weight < math.inf):
        raise ValueError(f"weight is {weight}, expected a finite number of at least 0")
    elements = 1 if norm == "mean" else f[0].numel()
    error_w = squared_distance(c_w, f, norm)  # (B,)
    if f_ref is None:
        return error_w.mean(), {"error": error_w.mean().detach() / elements}
    f_ref = f_ref.detach()  # the opponent does not learn
    reference_w = squared_distance(c_w, f_ref, norm)

    # The argument of l is -(dpo_part + spin_part).
    D_w = error_w - reference_w
    D_l = squared_distance(c_l, f, norm) - squared_distance(c_l, f_ref, norm)
    dpo_part = D_w - D_l
    spin_part = D_w - squared_distance(f_ref, f, norm)

    L_base = error_w.mean()
    L_pref = F.softplus(dpo * dpo_part + spin * spin_part).mean()  # l(-x) = softplus(x)
    loss = L_base + weight * L_pref if dpo or spin else L_base
    argument = -(dpo_part + spin_part)
    metrics = {
        "error": L_base / elements,
        "reference_error": reference_w.mean() / elements,
        "preference_loss": L_pref,
        "margin": argument.mean(),
        "implicit_accuracy": (argument > 0).float().mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def best_length(
    f: Tensor, c_l: Tensor, ideal: Tensor, reached: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute <c* - c_l, f - c_l> and |f - c_l|^2 per sample: (B, N, D) each -> (B,) twice.

    The ratio of their sums is b*: the multiple of f's own step f - c_l that ends nearest to the
    `ideal` tokens c*. A step of s times the length pays if b* > (1 + s) / 2, because the error is
    a parabola in the length. `reached` replaces f in the second number by what arrived of the step,
    such as the tokens of the image drawn with f: a weak injection takes up a share, and b* grows.
    """
    check_shapes("bnd bnd bnd bnd", f, c_l, ideal, reached)
    step = (f - c_l).flatten(1)
    taken = step if reached is None else (reached - c_l).flatten(1)
    return ((ideal - c_l).flatten(1) * step).sum(1), (taken * step).sum(1)


class ReferenceRefresh:
    """Decide when f is copied into f_ref (Eqs. 18 and 19).

    That is after f has been closer to c_w than f_ref for `k` iterations in a row.
    """

    def __init__(self, k: int = 10):
        """Raises ValueError if k is no whole number, or less than 1."""
        check_count("k", k, 1_000_000_000)
        self.k, self.streak, self.refreshes = k, 0, 0

    def update(self, error: float, reference_error: float) -> bool:
        """Count one iteration and return True if f is to be copied into f_ref now."""
        self.streak = self.streak + 1 if error < reference_error else 0
        if self.streak < self.k:
            return False
        self.streak, self.refreshes = 0, self.refreshes + 1
        return True

    def state_dict(self) -> dict[str, int]:
        """Return k, the current streak, and the refreshes so far."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore a `state_dict`."""
        vars(self).update(state)
