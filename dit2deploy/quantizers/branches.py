"""The float branches beside a quantized weight, low-rank and Monarch: where they come from, and what they compute."""

from collections.abc import Callable, Mapping

import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.ops.monarch import monarch_add
from dit2deploy.quantizers import low_rank, monarch

ALTERNATIONS = 4  # at most; they end at the first that does not help

Factors = dict[str, torch.Tensor]  # by the last part of their names, see LayerPolicy.branch_leaves


def fit(
    target: torch.Tensor,
    policy: LayerPolicy,
    *,
    seed: int,
    root: torch.Tensor | None = None,
    held: Factors | None = None,
) -> Factors:
    """The policy's branches of a float32 matrix [N, K], float16: the low-rank one first, then Monarch of what that
    leaves (methods.md 4.3). With `root` (`low_rank.moments_root`) in the norm of the layer's inputs.

    `held`: branches of another target that this one is near to: the low-rank branch is then fitted to what the Monarch
    branch of `held` leaves, so that neither has to find anew what the other has.
    """
    found: Factors = {}
    if policy.low_rank:
        rest = target - monarch.dense(held["monarch_down"], held["monarch_up"]) if held and policy.monarch else target
        found["up"], found["down"] = (
            low_rank.truncated_svd(rest, policy.low_rank, seed=seed)
            if root is None
            else low_rank.weighted_svd(rest, policy.low_rank, root, seed=seed)
        )
    if policy.monarch:
        rest = target - total(found) if found else target
        found["monarch_down"], found["monarch_up"] = monarch.project(rest, policy.monarch, root=root)
    return found


def total(factors: Factors) -> torch.Tensor:
    """What the branches, of which there must be one, add to the weight, float32 [N, K]."""
    parts = []
    if "up" in factors:
        parts.append(low_rank.branch(factors["up"], factors["down"]))
    if "monarch_up" in factors:
        parts.append(monarch.dense(factors["monarch_down"], factors["monarch_up"]))
    return sum(parts[1:], parts[0])


def add_branches(y: torch.Tensor, x: torch.Tensor, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """y + what the branches, if any, make of x, float32 [.., N], in plain matrix products; factors float32."""
    if "up" in factors:
        y = y + (x @ factors["down"].T) @ factors["up"].T
    if "monarch_up" in factors:
        y = monarch_add(y, x, factors["monarch_down"], factors["monarch_up"])
    return y


def split(
    weight: torch.Tensor,
    fitted: Callable[[torch.Tensor], Factors],
    quantized: Callable[[torch.Tensor], torch.Tensor],
    *,
    alternations: int = ALTERNATIONS,
    root: torch.Tensor | None = None,
) -> Factors:
    """The branches of a float32 weight [N, K] whose remainder is quantized.

    Branches come first (methods.md 3.3, V2): those `fitted` to the weight. Then, in turn, those of what quantizing the
    remainder leaves (V3, SVDQuant step 4) for as long as the squared error of the sum falls, `alternations` times at
    most. `quantized` maps a remainder [N, K] to its dequantized codes. The remainder is taken from the float16 factors,
    so that quantization makes up for their rounding as well. With `root` (see `low_rank.moments_root`) errors count in
    the norm of the layer's inputs: 4.3 starts from the residual, ours from the weight [inferred, as V2 and V3 gain far
    more than V1].
    """

    def size(error: torch.Tensor) -> torch.Tensor:
        return (error if root is None else error @ root).square().sum()

    best = fitted(weight)
    if not alternations:
        return best
    left_over = quantized(weight - total(best))
    least = size(weight - total(best) - left_over)
    for _ in range(alternations):
        candidate = fitted(weight - left_over)
        left_over = quantized(weight - total(candidate))
        error = size(weight - total(candidate) - left_over)
        if error >= least:
            break
        best, least = candidate, error
    return best
