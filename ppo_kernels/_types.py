"""What the public functions, the reference and the Triton kernels share: dtypes, estimators and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:
    ProcessGroup = Any  # a torch that was built without it

Function = TypeVar("Function", bound=Callable)

#: The KL estimators, the surrogates of a ratio and whose ratio it is; kernels take the position.
KL_ESTIMATORS = ("k1", "abs", "k2", "k3")
SURROGATES = ("clip", "cispo", "sapo", "dppo_tv", "dppo_kl")
RATIO_LEVELS = ("token", "sequence", "sequence_token", "geometric")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    for t in tensors:  # a loop, because every call of an op passes here and a generator costs a microsecond
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """What the reference adds up in: float64, or float32 on a device without it, such as Apple's MPS."""
    return torch.float64 if _has_float64(str(device)) else torch.float32


def element(value: float | Tensor) -> Tensor:
    """A number as a 0-d float64 tensor on the CPU, which a graph takes as an input.

    A sum, because the value of anything else, torch.full's too, becomes a constant of a compiled graph.
    """
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).reshape(())
    return torch.zeros((), dtype=torch.float64, device="cpu") + value


def constant_of_a_graph(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without its import of Dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_of_a_graph
def _has_float64(device: str) -> bool:
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype == torch.float64
    except (TypeError, RuntimeError):
        return False


class PolicyStats(NamedTuple):
    """Statistics of ``policy_loss``: 0-d tensors, unweighted means over valid tokens, 0 where there are none.

    With ``d = clamp(logprobs - old_logprobs)`` of the token, and ``ratio`` the one that the surrogate takes:
    """

    approx_kl_k1: Tensor  #: mean of -d
    approx_kl_k2: Tensor  #: mean of d^2 / 2
    approx_kl_k3: Tensor  #: mean of exp(d) - 1 - d
    ratio_mean: Tensor
    ratio_var: Tensor  #: population variance
    ratio_max: Tensor
    #: Share clipped from above: A > 0 and ratio > 1 + cliprange_high; whatever A is for cispo; for dppo, A > 0 and the
    #: token's probability has risen too far; for the level "geometric", A > 0 and the token's d > cliprange_high; 0 for
    #: sapo.
    clipfrac_high: Tensor
    clipfrac_low: Tensor  #: share clipped from below: the same with A < 0 and the other bound
    #: Share whose loss dual_clip or delta lowered; for dppo, whose ratio delta bounded and whose loss is not 0.
    dual_clipfrac: Tensor
    ref_kl: Tensor  #: mean KL estimate against ref_logprobs (0 without them)
    clamp_frac: Tensor  #: share whose log-ratio, the token's or the row's, lies beyond log_ratio_clamp
    ess: Tensor  #: effective sample size of the weights over the number of tokens: (sum w)^2 / (n sum w^2)
    entropy: Tensor  #: mean entropy (0 without it)
    count: Tensor  # type: ignore[assignment]  #: number of valid tokens


class LogprobExtras(NamedTuple):
    """What ``token_logprobs`` says of each row on request (``extras=``), without a gradient; None where not asked."""

    sum_sq_probs: Tensor | None  #: sum of the squares of the probabilities, 0 where masked
    top1: Tensor | None  #: of the labels' shape, bool: no logit of the row is larger than the label's


class ImportanceStats(NamedTuple):
    """Statistics of ``importance_weights``: 0-d tensors over the valid tokens, all 0 when there are none.

    With ``d = clamp(logprobs - rollout_logprobs)`` of the token, and ``ratio`` that of the level:
    """

    ess: Tensor  #: effective sample size over the number of tokens: (sum w)^2 / (n sum w^2)
    kl_k1: Tensor  #: mean of -d, an estimate of KL(rollout || policy)
    kl_k3: Tensor  #: mean of exp(d) - 1 - d, another one
    chi2: Tensor  #: mean of exp(2 d) - 1
    perplexity: Tensor  #: exp of the mean of -logprobs
    rollout_perplexity: Tensor  #: that of the rollout
    weight_mean: Tensor
    ratio_max: Tensor
    clipfrac_high: Tensor  #: share with ratio > the upper bound
    clipfrac_low: Tensor  #: share with ratio < the lower bound
    rejectfrac: Tensor  #: share that is not kept
    count: Tensor  # type: ignore[assignment]  #: number of valid tokens


class ValueStats(NamedTuple):
    """Statistics of ``value_loss``: 0-d tensors over the valid tokens, all 0 when there are none."""

    clipfrac: Tensor  #: share where the clipped term is the larger
    error_mean: Tensor  #: mean of values - returns
    explained_variance: Tensor  #: 1 - Var(returns - values) / Var(returns); 0 where Var(returns) is 0
    count: Tensor  # type: ignore[assignment]  #: number of valid tokens


class GroupStats(NamedTuple):
    """Statistics of ``group_advantages``: 0-d int64 tensors on the scores' device, which add up over ranks."""

    groups: Tensor
    #: Groups that teach nothing: no reward has two finite scores that differ, so that every advantage is 0.
    zero_variance: Tensor
    nonfinite: Tensor  #: scores that are NaN or infinite


class P3OStats(NamedTuple):
    """Statistics of ``p3o_loss``: 0-d tensors, means over rows or pairs with valid tokens, 0 where there are none.

    Per row, with ``d = clamp(sum of logprobs - old_logprobs)``, in nats per sequence, and ``ratio = exp(d)``:
    """

    approx_kl_k1: Tensor  #: mean of -d
    approx_kl_k3: Tensor  #: mean of exp(d) - 1 - d
    ref_kl: Tensor  #: mean of S, the sum of logprobs - ref_logprobs
    ratio_mean: Tensor
    ratio_max: Tensor
    clamp_frac: Tensor  #: share of rows whose log-ratio lies beyond log_ratio_clamp

    # Per pair:
    weight_mean: Tensor  #: mean importance weight w
    weight_clipfrac: Tensor  #: share of weights that weight_clip bounded
    clipfrac: Tensor  #: share of terms whose gradient the clip stopped
    reward_gap: Tensor  #: mean of |q|
    margin: Tensor  #: mean of sign(r_i - r_j) (S_i - S_j): how far the policy prefers the better response, in nats
    accuracy: Tensor  #: share where (r_i - r_j) (S_i - S_j) > 0
    count: Tensor  # type: ignore[assignment]  #: number of pairs


class Experience(NamedTuple):
    """What ``prepare_experience`` makes of a rollout."""

    rewards: Tensor
    advantages: Tensor  #: whitened
    returns: Tensor  #: advantages before whitening, plus values
    kl: Tensor  #: the KL estimate summed over each sequence, [B]
