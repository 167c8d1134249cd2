"""The same work by other libraries: their own functions, from their own packages (bench/peers.txt)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace

from bench import peer_calls as calls
from bench.cases import DEVICE, Inputs
from bench.peer_calls import AbsentError, Call

FOLDER = Path(__file__).parent.parent / "build" / "peers"
if FOLDER.is_dir() and str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))  # last: what the environment brings comes first


@dataclass(frozen=True)
class Peer:
    package: str  # on PyPI
    load: Callable[[], SimpleNamespace | ModuleType]
    how: str  # what is loaded
    works: dict[str, Callable[..., Call]]
    device: str | None = None  # the only device type that it serves


def imported(module: str) -> Callable[[], ModuleType]:
    return partial(importlib.import_module, module)


LOGPROBS, ENTROPY, BACKWARD = "token_logprobs", "token_logprobs + entropy", "token_logprobs fwd+bwd"
FROM_LOGITS = "token_logprobs + policy_loss fwd+bwd"
LINEAR, LINEAR_BACKWARD = "linear_token_logprobs", "linear_token_logprobs fwd+bwd"
LINEAR_LOSS = "linear_policy_loss fwd+bwd"

#: In the order of the report's columns.
PEERS = {
    "TRL": Peer(
        "trl",
        calls.load_trl,
        "functions of trl/trainer/utils.py and trl/kernels (the package imports accelerate and datasets)",
        {
            LOGPROBS: calls.trl_logprobs,
            BACKWARD: calls.trl_logprobs,
            ENTROPY: calls.trl_entropy,
            LINEAR: calls.trl_linear,
            LINEAR_BACKWARD: calls.trl_linear,
            LINEAR_LOSS: calls.trl_linear_policy_loss,
        },
    ),
    "verl": Peer(
        "verl",
        calls.load_verl,
        "functions of torch_functional.py, core_algos.py and ray_trainer.py (the package imports ray and tensordict)",
        {
            LOGPROBS: calls.verl_logprobs,
            BACKWARD: calls.verl_logprobs,
            ENTROPY: calls.verl_entropy,
            FROM_LOGITS: calls.verl_from_logits,
            "gae + whiten": calls.verl_gae,
            "kl_rewards k1": partial(calls.verl_penalty, estimator="k1"),
            "kl_rewards k3": partial(calls.verl_penalty, estimator="k3"),
            "kl_rewards + gae + whiten": calls.verl_experience,
            "whiten": lambda verl, x, mask: lambda: verl.masked_whiten(x, mask),
            "policy_loss fwd+bwd": calls.verl_policy_loss,
            "policy_loss GSPO-token fwd+bwd": partial(calls.verl_policy_loss, loss="gspo"),
            "policy_loss SAPO fwd+bwd": calls.verl_sapo_loss,
            "policy_loss DPPO-TV fwd+bwd": partial(calls.verl_policy_loss, loss="dppo_tv"),
            "policy_loss + entropy bonus fwd+bwd": calls.verl_policy_loss_with_entropy,
            "value_loss fwd+bwd": calls.verl_value_loss,
            "importance_weights TIS": calls.verl_importance_weights,
            "group_advantages grpo": calls.verl_group_advantages,
            "group_advantages gdpo": calls.verl_group_advantages,
        },
    ),
    "OpenRLHF": Peer(
        "openrlhf",
        calls.load_openrlhf,
        "functions of models/utils.py, models/loss.py and experience_maker.py (the package imports deepspeed and vLLM)",
        {
            LOGPROBS: calls.openrlhf_logprobs,
            BACKWARD: calls.openrlhf_logprobs,
            "gae": calls.openrlhf_gae,
            "kl_rewards k1": partial(calls.openrlhf_rewards, estimator="k1"),
            "kl_rewards k3": partial(calls.openrlhf_rewards, estimator="k3"),
            "policy_loss fwd+bwd": calls.openrlhf_policy_loss,
            "value_loss fwd+bwd": calls.openrlhf_value_loss,
        },
    ),
    "SkyRL": Peer(
        "skyrl",
        calls.load_skyrl,
        "functions of torch_utils.py and ppo_utils.py (the package imports ray)",
        {
            LOGPROBS: calls.skyrl_logprobs,
            "gae + whiten": calls.skyrl_gae,
            "whiten": lambda skyrl, x, mask: lambda: skyrl.masked_whiten(x, mask),
        },
    ),
    "torchrl": Peer("torchrl", imported("torchrl.objectives.value.functional"), "imported", {"gae": calls.torchrl_gae}),
    "Liger": Peer(
        "liger-kernel",
        calls.load_liger,
        "imported; its cross entropy writes the gradient over the logits, so each call gets a copy of them",
        {LOGPROBS: calls.liger_selective, BACKWARD: calls.liger_cross_entropy, FROM_LOGITS: calls.liger_grpo},
        device="cuda",
    ),
    "flash-attn": Peer(
        "flash-attn",
        imported("flash_attn.ops.triton.cross_entropy"),
        "imported",
        {LOGPROBS: calls.flash_attn_logprobs, BACKWARD: calls.flash_attn_logprobs},
        device="cuda",
    ),
    "QuACK": Peer(
        "quack-kernels",
        imported("quack.cross_entropy"),
        "imported",
        {LOGPROBS: calls.quack_logprobs, BACKWARD: calls.quack_logprobs},
        device="cuda",
    ),
    "F.linear_cross_entropy": Peer(
        "torch",
        imported("torch"),
        "imported; torch >= 2.13",
        {LINEAR: calls.torch_linear, LINEAR_BACKWARD: calls.torch_linear},
    ),
    "F.cross_entropy": Peer(
        "torch",
        imported("torch"),
        "imported",
        {LOGPROBS: calls.torch_logprobs, BACKWARD: calls.torch_logprobs},
    ),
}


@cache
def _loaded(name: str) -> SimpleNamespace | ModuleType:
    peer = PEERS[name]
    if peer.device not in (None, DEVICE):
        raise AbsentError(f"{peer.package} serves {peer.device} tensors alone")
    try:
        found = version(peer.package)
    except PackageNotFoundError:
        raise AbsentError(f"{peer.package} is not installed (see bench/peers.txt)") from None
    try:
        return peer.load()
    except (ImportError, LookupError, OSError) as error:
        raise AbsentError(f"{peer.package} {found} cannot be loaded here: {error}") from error


def call(name: str, work: str, inputs: Inputs) -> Call:
    """What the peer does for this work, or AbsentError."""
    return PEERS[name].works[work](_loaded(name), **inputs)


def for_work(work: str) -> list[str]:
    return [name for name, peer in PEERS.items() if work in peer.works]


def describe(name: str) -> dict[str, str]:
    peer = PEERS[name]
    try:
        return {"version": f"{peer.package} {version(peer.package)}", "loaded": peer.how}
    except PackageNotFoundError:
        return {"version": "not installed"}
