"""Megatron Core: its ``output_processor``, by which a GPTModel returns log-probabilities and never makes its logits.

    model(..., labels=labels, output_processor=output_processor, output_processor_context=Head(temperature=0.7))

The call is that of ``GPTModel._postprocess`` in megatron-core 0.18 and later (read in 0.19.2); nothing is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppo_kernels.ops.linear_token_logprobs import linear_token_logprobs

__all__ = ["Head", "output_processor"]


@dataclass(frozen=True)
class Head:
    """The ``output_processor_context``: options of ``linear_token_logprobs``."""

    temperature: float | Tensor = 1.0  #: a number, or a tensor that broadcasts to the labels
    entropy: bool | str = False
    memory_mib: float | None = None


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None = None,
    context: Head | None = None,
    config: Any,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of the labels, ``[batch, sequence]`` like them, and the entropy if the context asks for it.

    Labels are those that Megatron's loss takes: of a position, the token after it. Tokens of ``loss_mask`` 0 enter no
    product and get 0. Each rank of the tensor-parallel group has the results of the whole vocabulary; the gradient of
    the hidden states is summed over the group here, so that sequence parallelism only has to cut it.
    """
    if labels is None:
        raise ValueError("output_processor: there are no labels; call the model with labels=")
    head = Head() if context is None else context
    weight = output_layer.weight if output_weight is None else output_weight
    group = output_layer.tp_group
    sharded = group.size() > 1
    if sharded and config.sequence_parallel:
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=group
        )
    return linear_token_logprobs(
        hidden_states.transpose(0, 1),
        weight,
        labels,
        bias=output_layer.bias,
        temperature=head.temperature,
        logit_scale=config.mup_output_mult if config.use_mup else 1.0,
        mask=loss_mask,
        entropy=head.entropy,
        group=group if sharded else None,
        vocab_start=group.rank() * weight.size(0) if sharded else 0,
        memory_mib=head.memory_mib,
    )
