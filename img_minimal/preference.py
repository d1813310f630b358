"""The Iteratively Updated Preference Objective (Eqs. 4-7 and 15-19): the aligner's loss, as functions of tensors.

    paper     here        meaning
    f(c)      aligned     what the aligner makes of the non-preferred image's tokens
    f_ref(c)  reference   the same from a frozen earlier copy of the aligner
    c_w, c_l  winner,     image tokens of the preferred and of the non-preferred image
              loser
    lambda    weight      of the preference term

All are (B, N, D). With D(a) = ||a - f||^2 - ||a - f_ref||^2 and l(x) = log(1 + exp(-x)):

    L_base = ||c_w - f||^2                                                                  Eq. 4
    L_pref = l( -[ (D(c_w) - D(c_l)) + (D(c_w) - ||f_ref - f||^2) ] )                       Eqs. 5-7, 15-17
                   DPO: prefer c_w to c_l   SPIN: prefer c_w to one's own earlier answer
    L = L_base + lambda * L_pref

The term squared in f appears 2 - 1 - 1 = 0 times, so the argument of l is *affine* in f: its gradient points along
2 c_w - c_l - f_ref wherever f is, away from the loser and from the earlier answer; only l says how far to go.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_distance(a: Tensor, b: Tensor, norm: str = "mean") -> Tensor:
    """||a - b||^2 per sample, in fp32 or float64: (B, ...) x 2 -> (B,); `norm`: are elements averaged or summed?

    The paper leaves this open. It sets how fast l saturates: summed over 16 x 2048 elements, any difference is a
    large one. Raises ValueError for another `norm`.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)  # never less than fp32
    squares = (a.to(dtype) - b.to(dtype)).square().flatten(1)
    if norm not in ("mean", "sum"):
        raise ValueError(f"norm is {norm!r}, expected 'mean' or 'sum'")
    return squares.mean(1) if norm == "mean" else squares.sum(1)


def preference_loss(
    aligned: Tensor,
    reference: Tensor | None,
    winner: Tensor,
    loser: Tensor,
    *,
    weight: float = 1.0,
    dpo: bool = True,
    spin: bool = True,
    norm: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_base + weight * L_pref, averaged over the batch; four tensors (B, N, D) -> (loss (), metrics).

    `dpo` and `spin` choose the parts of L_pref; without both, or without a `reference`, the loss is L_base alone, and
    without a `reference` its `error` is the only metric. Metrics, detached scalars:
    `error` ||c_w - f||^2, `reference_error` ||c_w - f_ref||^2, `preference_loss` (log 2 without both parts), `margin`
    (mean argument of l), `implicit_accuracy` (share of samples whose argument of l is positive). The last two always
    concern the full argument, so that runs with and without a part compare. Raises ValueError for an unknown `norm`.
    """
    error = squared_distance(winner, aligned, norm)  # (B,)
    if reference is None:
        return error.mean(), {"error": error.mean().detach()}
    reference = reference.detach()  # the opponent does not learn
    reference_error = squared_distance(winner, reference, norm)  # (B,)
    gap_winner = error - reference_error  # D(c_w)
    gap_loser = squared_distance(loser, aligned, norm) - squared_distance(loser, reference, norm)  # D(c_l)
    dpo_part = gap_winner - gap_loser
    spin_part = gap_winner - squared_distance(reference, aligned, norm)

    preference = F.softplus(dpo * dpo_part + spin * spin_part).mean()  # l(-x) = softplus(x)
    loss = error.mean() + weight * preference if dpo or spin else error.mean()
    argument = -(dpo_part + spin_part)
    metrics = {
        "error": error.mean(),
        "reference_error": reference_error.mean(),
        "preference_loss": preference,
        "margin": argument.mean(),
        "implicit_accuracy": (argument > 0).float().mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


class ReferenceRefresh:
    """Decides when the aligner is copied into its reference (Eqs. 18 and 19).

    That is when f has been closer to c_w than f_ref for `k` iterations on end; one miss starts the count again.
    """

    def __init__(self, k: int = 10):
        """Raises ValueError if k < 1."""
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        self.k, self.streak, self.refreshes = k, 0, 0

    def update(self, error: float, reference_error: float) -> bool:
        """Count one iteration; both errors are distances to c_w. True: copy f into f_ref now."""
        self.streak = self.streak + 1 if error < reference_error else 0
        if self.streak < self.k:
            return False
        self.streak, self.refreshes = 0, self.refreshes + 1
        return True

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to know: the current streak and the refreshes so far."""
        return {"streak": self.streak, "refreshes": self.refreshes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The inverse of `state_dict`."""
        self.streak, self.refreshes = state["streak"], state["refreshes"]
