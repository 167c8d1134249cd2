"""The same work by other libraries: their own functions, from their own packages (bench/peers.txt)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch import Tensor

from bench import peer_calls as calls
from bench.cases import CLIP, DEVICE, GAMMA, LAM, Inputs
from bench.source import functions

FOLDER = Path(__file__).parent.parent / "build" / "peers"
if FOLDER.is_dir() and str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))  # last: what the environment brings comes first

Call = Callable[[], object]
#: What a library does, by work: from its functions and the inputs of a case to the call that is timed.
Works = dict[str, Callable[..., Call]]
Expression = Callable[[SimpleNamespace, SimpleNamespace], object]


class AbsentError(Exception):
    """Why a provider has no row."""


@dataclass(frozen=True)
class Peer:
    package: str  # on PyPI
    load: Callable[[], SimpleNamespace]
    works: Works
    how: str = "imported"  # what is loaded
    device: str | None = None  # the only device type that it serves


def imported(*modules: str, needs: str = "") -> SimpleNamespace:
    """All names of these modules."""
    found = SimpleNamespace()
    for module in modules:
        vars(found).update(vars(importlib.import_module(module)))
    if needs and not hasattr(found, needs):
        raise LookupError(f"it has no {needs}")
    return found


def read(package: str, files: dict[str, str], modules: str = "", **given: object) -> SimpleNamespace:
    """Functions of files of a package that cannot be imported.

    Each file has those of the files before it, by their names and as the ``modules`` that it imports them from.
    """
    found = SimpleNamespace()
    given |= dict.fromkeys(modules.split(), found)
    for file, names in files.items():
        vars(found).update(functions(package, file, *names.split(), **given, **vars(found)))
    return found


def reading(
    package: str, imports: str, files: dict[str, str], works: Works, modules: str = "", **given: object
) -> Peer:
    """One whose package cannot be imported, for what it imports in turn."""
    how = f"functions of {', '.join(Path(file).name for file in files)} (the package imports {imports})"
    return Peer(package, partial(read, package, files, modules, **given), works, how)


def expressions(table: dict[tuple[str, ...], Expression], **ready: Callable[[Tensor], Tensor]) -> Works:
    """Works that are one expression of the library and the inputs; ``ready`` makes some of the inputs ready, once."""

    def prepared(expression: Expression, library: SimpleNamespace, **inputs: Tensor) -> Call:
        inputs |= {name: make(inputs[name]) for name, make in ready.items() if name in inputs}
        return partial(expression, library, SimpleNamespace(**inputs))

    return {work: partial(prepared, expression) for works, expression in table.items() for work in works}


def load_trl() -> SimpleNamespace:
    # What the backward imports of the package: a context for weights that ZeRO-3 has parted.
    utils = sys.modules["bench_trl.trainer.utils"] = ModuleType("bench_trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_parameters: nullcontext()
    given: dict[str, object] = {"__package__": "bench_trl.kernels"}
    if importlib.util.find_spec("triton"):
        # This file imports nothing of its package, and Triton wants its kernels in a real file.
        path = distribution("trl").locate_file("trl/kernels/logprob_entropy.py")
        spec = importlib.util.spec_from_file_location("bench_trl", path)
        fused = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fused)
        given["_fused_logprob_entropy"] = fused.selective_log_softmax_and_entropy
    files = {
        "trl/kernels/chunked_logprob.py": "ChunkedLogProbFunction _use_triton",
        "trl/trainer/utils.py": "selective_log_softmax entropy_from_logits selective_log_softmax_and_entropy",
    }
    return read("trl", files, **given)


LOGPROBS = FORWARD, BACKWARD = "token_logprobs", "token_logprobs fwd+bwd"
LINEAR = "linear_token_logprobs", "linear_token_logprobs fwd+bwd"
ENTROPY, FROM_LOGITS = ("token_logprobs + entropy",), "token_logprobs + policy_loss fwd+bwd"
SEQUENCES = {"logits": calls.sequences, "labels": calls.sequences}
CROSS_ENTROPY = {LOGPROBS: lambda f, x: -f.cross_entropy(x.logits, x.labels, reduction="none")}

#: In the order of the report's columns.
PEERS = {
    "TRL": Peer(
        "trl",
        load_trl,
        expressions(
            {
                LOGPROBS: lambda f, x: f.selective_log_softmax(x.logits, x.labels).flatten(),
                ENTROPY: lambda f, x: [y.flatten() for y in f.selective_log_softmax_and_entropy(x.logits, x.labels)],
            },
            **SEQUENCES,
        )
        | expressions({LINEAR: lambda f, x: calls.trl_chunked(f, x.hidden, x.weight, x.labels)})
        | {"linear_policy_loss fwd+bwd": calls.trl_linear_policy_loss},
        "functions of trl/trainer/utils.py and trl/kernels (the package imports accelerate and datasets)",
    ),
    "verl": reading(
        "verl",
        "ray and tensordict",
        {
            "verl/utils/torch_functional.py": "logprobs_from_logits entropy_from_logits masked_sum masked_mean "
            "masked_whiten clip_by_value",
            "verl/trainer/ppo/core_algos.py": "compute_gae_advantage_return compute_value_loss kl_penalty "
            "compute_policy_loss_vanilla compute_policy_loss_gspo compute_policy_loss_sapo compute_policy_loss_dppo_tv "
            "agg_loss FixedKLController compute_grpo_outcome_advantage compute_gdpo_outcome_advantage",
            "verl/trainer/ppo/rollout_corr_helper.py": "compute_rollout_correction_weights",
            "verl/trainer/ppo/ray_trainer.py": "apply_kl_penalty",
        },
        expressions(
            {
                LOGPROBS: calls.verl_logprobs,
                ENTROPY: lambda f, x: (calls.verl_logprobs(f, x), f.entropy_from_logits(x.logits)),
                ("gae + whiten",): lambda f, x: f.compute_gae_advantage_return(x.rewards, x.values, x.mask, GAMMA, LAM),
                ("value_loss fwd+bwd",): lambda f, x: f.compute_value_loss(
                    x.values, x.returns, x.old_values, x.mask, CLIP
                )[0],
            },
            mask=Tensor.long,
        )
        | {
            FROM_LOGITS: calls.verl_from_logits,
            "kl_rewards k1": partial(calls.verl_penalty, estimator="k1"),
            "kl_rewards k3": partial(calls.verl_penalty, estimator="k3"),
            "kl_rewards + gae + whiten": calls.verl_experience,
            "whiten": lambda verl, x, mask: lambda: verl.masked_whiten(x, mask),
            "policy_loss fwd+bwd": calls.verl_policy_loss,
            "policy_loss GSPO-token fwd+bwd": partial(calls.verl_policy_loss, loss="gspo"),
            "policy_loss SAPO fwd+bwd": calls.verl_sapo_loss,
            "policy_loss DPPO-TV fwd+bwd": partial(calls.verl_policy_loss, loss="dppo_tv"),
            "policy_loss + entropy bonus fwd+bwd": calls.verl_policy_loss_with_entropy,
            "importance_weights TIS": calls.verl_importance_weights,
            "group_advantages grpo": calls.verl_group_advantages,
            "group_advantages gdpo": calls.verl_group_advantages,
        },
        modules="verl_F core_algos",
        AlgoConfig=type("AlgoConfig", (), {}),  # what the config must not be
        ActorConfig=calls.VerlConfig,  # what some want it to be
    ),
    "OpenRLHF": reading(
        "openrlhf",
        "deepspeed and vLLM",
        {
            "openrlhf/models/utils.py": "log_probs_from_logits compute_approx_kl compute_reward masked_mean",
            "openrlhf/models/loss.py": "PolicyLoss ValueLoss",
            "openrlhf/trainer/ppo_utils/experience_maker.py": "RemoteExperienceMaker.get_advantages_and_returns",
        },
        expressions(
            {
                LOGPROBS: lambda f, x: f.log_probs_from_logits(x.logits, x.labels).flatten(),
                ("gae",): lambda f, x: f.get_advantages_and_returns(None, x.values, x.rewards, x.mask, GAMMA, LAM),
            },
            **SEQUENCES,
        )
        | {
            "kl_rewards k1": partial(calls.openrlhf_rewards, estimator="k1"),
            "kl_rewards k3": partial(calls.openrlhf_rewards, estimator="k3"),
            "policy_loss fwd+bwd": calls.openrlhf_policy_loss,
            "value_loss fwd+bwd": calls.openrlhf_value_loss,
        },
    ),
    "SkyRL": reading(
        "skyrl",
        "ray",
        {
            "skyrl/backends/skyrl_train/utils/torch_utils.py": "logprobs_from_logits masked_mean",
            "skyrl/backends/skyrl_train/utils/ppo_utils.py": "compute_gae_advantage_return masked_whiten",
        },
        expressions({(FORWARD,): lambda f, x: f.logprobs_from_logits(x.logits, x.labels, False).flatten()}, **SEQUENCES)
        | {
            "gae + whiten": calls.skyrl_gae,
            "whiten": lambda skyrl, x, mask: lambda: skyrl.masked_whiten(x, mask),
        },
        register_advantage_estimator=lambda name: lambda function: function,  # a registry of ray actors
    ),
    "torchrl": Peer("torchrl", partial(imported, "torchrl.objectives.value.functional"), {"gae": calls.torchrl_gae}),
    "Liger": Peer(
        "liger-kernel",
        partial(imported, "liger_kernel.ops.cross_entropy", "liger_kernel.transformers.grpo_loss"),
        {FORWARD: calls.liger_selective, BACKWARD: calls.liger_cross_entropy, FROM_LOGITS: calls.liger_grpo},
        "imported; its cross entropy writes the gradient over the logits, so each call gets a copy of them",
        device="cuda",
    ),
    "flash-attn": Peer(
        "flash-attn",
        partial(imported, "flash_attn.ops.triton.cross_entropy"),
        expressions({LOGPROBS: lambda f, x: -f.cross_entropy_loss(x.logits, x.labels, inplace_backward=False)[0]}),
        device="cuda",
    ),
    "QuACK": Peer("quack-kernels", partial(imported, "quack.cross_entropy"), expressions(CROSS_ENTROPY), device="cuda"),
    "F.linear_cross_entropy": Peer(
        "torch",
        partial(imported, "torch.nn.functional", needs="linear_cross_entropy"),
        expressions({LINEAR: lambda f, x: -f.linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none")}),
        "imported; torch >= 2.13",
    ),
    "F.cross_entropy": Peer("torch", partial(imported, "torch.nn.functional"), expressions(CROSS_ENTROPY)),
}


@cache
def _loaded(name: str) -> SimpleNamespace:
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
