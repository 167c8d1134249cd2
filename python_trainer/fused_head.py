"""Log-probabilities without logits: the model runs up to its head, and head and log-softmax are one op.

The model's own forward pass runs, with a head that keeps what it is given, so that whatever a family does between its
body and its head is done. What it does behind the head is found out with logits made for it, and fused where it is a
scale and a soft cap.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ppo_kernels import linear_token_logprobs

from .config import UserError

#: `auto` fuses where the logits of a call would take more: below it, computing them once is faster.
LARGE = 256 << 20


@dataclass
class FusedHead:
    """A model's last linear layer, and what becomes of its logits: softcap * tanh(logit_scale * logits / softcap)."""

    layer: torch.nn.Linear
    softcap: float
    logit_scale: float

    def token_logprobs(
        self,
        model: Callable[..., Any],
        inputs: dict[str, Any],
        labels: torch.Tensor,
        vocabulary: int | None,
        **options: Any,
    ) -> Any:
        """``ppo_kernels.token_logprobs`` of the model's first `vocabulary` logits."""
        kept: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            kept.append(hidden)
            return hidden.new_empty((*hidden.shape[:-1], 0))

        with _instead(self.layer, keep):
            model(**inputs)
        (hidden,) = kept
        weight: torch.Tensor = self.layer.weight
        bias: torch.Tensor | None = self.layer.bias
        if vocabulary is not None and vocabulary < len(weight):  # a slice of all would cost a copy of its gradient
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        return linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias=bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            **options,
        )


@contextlib.contextmanager
def _instead(layer: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    own = vars(layer).get("forward")  # of somebody who put one in its place, too
    layer.forward = function
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def fused_head(model: Any, choice: str, tokens: int) -> FusedHead | None:
    """The head of a language model of transformers where it can be fused; `choice` is the setting of this name.

    `tokens`: the most that one call scores. All calls of a run go one way, since the two round differently.
    """
    if choice == "off":
        return None
    try:
        head = _found(model)
        weight = head.layer.weight
        return head if choice == "on" or tokens * len(weight) * weight.element_size() > LARGE else None
    except ValueError as why:
        if choice == "on":
            raise UserError(f"fused_head on: {why}; set fused_head auto or off") from why
        return None


def _found(model: Any) -> FusedHead:
    layer = model.get_output_embeddings()
    if type(layer) is not torch.nn.Linear:
        kind = "no output layer" if layer is None else f"a {type(layer).__name__} as its head"
        raise ValueError(f"{type(model).__name__} has {kind}, and a plain linear layer is needed")
    if any(hasattr(weight, "ds_id") for weight in layer.parameters()):
        raise ValueError("at ZeRO stage 3 the weight of the head is not there when the log-probabilities are computed")
    softcap, scale = _after(model, layer)
    return FusedHead(layer, softcap, scale)


@torch.no_grad()
def _after(model: Any, layer: torch.nn.Linear) -> tuple[float, float]:
    """Soft cap and scale of the model's logits, from what it makes of some that are given to it."""
    width = layer.out_features
    given = torch.linspace(-60.0, 60.0, width, dtype=torch.float64).to(layer.weight)
    calls = 0

    def give(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return given.expand(*hidden.shape[:-1], width).clone()

    ids = torch.zeros(1, 2, dtype=torch.long, device=layer.weight.device)
    with _instead(layer, give):
        got = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    if calls != 1:
        raise ValueError(f"{type(model).__name__} calls its head {calls} times")
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None) or math.inf
    scales = [1.0, *(getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))]
    if divisor := getattr(config, "logits_scaling", None):
        scales.append(1.0 / divisor)
    tolerance = 1e-5 if layer.weight.dtype == torch.float32 else 2e-2
    for scale in filter(None, scales):
        expected = given.double() * scale
        if math.isfinite(cap):
            expected = cap * torch.tanh(expected / cap)
        if torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
            return cap, float(scale)
    raise ValueError(f"{type(model).__name__} does more to its logits than a scale and a soft cap")
