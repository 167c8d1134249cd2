"""What several adapters do: groups by prompt, the denominators of losses, entropies of logits, the KL per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_kernels.integrations._target import NotCoveredError
from ppo_kernels.ops.aggregation_weights import aggregation_weights
from ppo_kernels.ops.group_advantages import group_advantages
from ppo_kernels.ops.kl_rewards import kl_rewards
from ppo_kernels.ops.token_logprobs import token_logprobs


def no_gradient(*tensors: object) -> None:
    """Leave a call to the trainer if it would be differentiated: the op behind the replacement has no gradient."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise NotCoveredError("the call is differentiated")


def plain(*tensors: object) -> None:
    """Leave a call to the trainer if a tensor is nested or of a subclass: rows and columns are not where we look."""
    for x in tensors:
        if isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter):
            raise NotCoveredError(f"a {type(x).__name__}")


def entropy_of(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The entropy of each row, differentiable; the label that the op also looks at does not matter."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, index, mask=mask, entropy=True)[1]


def kl_per_token(
    log_probs: Tensor,
    log_probs_base: Tensor,
    mask: Tensor | None,
    estimator: str,
    log_clamp: float | None,
    clamp: float | None,
) -> Tensor:
    """A reward without a score and with the coefficient -1 is the estimate."""
    rows = log_probs.size(0)
    nowhere = torch.full((rows,), -1, device=log_probs.device)
    return kl_rewards(
        log_probs,
        log_probs_base,
        torch.zeros(rows, device=log_probs.device),
        mask,
        kl_coef=-1.0,
        kl_estimator=estimator,
        kl_log_clamp=log_clamp,
        kl_clamp=clamp,
        score_index=nowhere,
    )[0]


def operands(*given: Tensor | None) -> list[Any]:
    """Factors of a product in the dtype that autocast would give them: it has no say in our products."""
    device = next(x.device.type for x in given if x is not None)
    if not torch.is_autocast_enabled(device):
        return list(given)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in given]


def whole(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask, if it has an element for each of ``like`` and none is a weight. (Floats are looked at.)"""
    if mask is not None and mask.shape != like.shape:
        raise NotCoveredError(f"a mask of shape {tuple(mask.shape)} for tensors of shape {tuple(like.shape)}")
    if mask is not None and mask.is_floating_point() and bool(((mask != 0) & (mask != 1)).any()):
        raise NotCoveredError("a mask of weights")
    return mask


def aggregation(
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[Tensor | None, Any]:
    """``row_weight`` and ``normalizer`` of verl's ``agg_loss``, whose arguments these are."""
    if mode == "token-sum":
        return None, 1.0 / dp_size
    count = batch_num_tokens if mode == "token-mean" else global_batch_size
    if count is None and dp_size > 1:
        raise NotCoveredError(f"{mode} over {dp_size} ranks without the count of all")
    if mode == "token-mean":
        return None, None if count is None else count / dp_size
    length = loss_scale_factor if mode == "seq-mean-token-sum-norm" else None
    weight, rows = aggregation_weights(mask, mode, max_length=length)
    return weight, (rows if count is None else count) / dp_size


def over_groups(token_rewards: Tensor, index: Any, mode: str, eps: float = 0.0, *, alone: str = "score") -> Tensor:
    """Advantages ``[B]`` over the responses with the same entry in ``index``, which holds numbers or strings.

    ``alone`` says what the only response of its group gets: its "score", that divided by "1 + eps", or "zero".
    """
    if isinstance(index, Tensor):
        raise NotCoveredError("an index that is a tensor")
    no_gradient(token_rewards)
    scores = token_rewards.sum(-1)
    groups: dict[Any, int] = {}
    keys = index.tolist() if isinstance(index, np.ndarray) else list(index)
    try:
        numbers = [groups.setdefault(key, len(groups)) for key in keys]
    except TypeError as error:
        raise NotCoveredError(f"an index that no dictionary takes: {error}") from None
    ids = torch.tensor(numbers, dtype=torch.int64)
    group_ids, sizes = ids.to(scores.device), torch.bincount(ids)
    advantages = group_advantages(scores, group_ids, mode=mode, eps=eps)
    # The op leaves out what is not finite. The trainers do not, and whoever reads a NaN there means to see it.
    spoiled = torch.zeros_like(scores).index_add(0, group_ids, scores - scores)
    advantages = advantages + spoiled[group_ids]
    if alone != "zero" and bool((sizes == 1).any()):
        single = (sizes[ids] == 1).to(scores.device)
        kept = scores / (1.0 + eps) if alone == "1 + eps" else scores
        advantages = torch.where(single, kept, advantages)
    return advantages
