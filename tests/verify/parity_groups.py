"""Advantages over a group, as other trainers compute them: their functions, and statements of their methods."""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.metadata import distribution
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.verify.parity import Config, _load, _registered


@cache
def verl() -> SimpleNamespace:
    names = [
        f"compute_{name}_outcome_advantage" for name in ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "gdpo")
    ]
    tensors = _load("verl", "verl/utils/torch_functional.py", "masked_whiten", "masked_mean")
    index = _load(
        "verl", "verl/utils/groupwise.py", "as_torch_index", "group_mean_std", get_device_name=lambda: "cpu"
    )  # fmt: skip
    return _load(
        "verl", "verl/trainer/ppo/core_algos.py", *names, verl_F=tensors, register_adv_est=lambda _: _registered(_),
        AlgoConfig=dict, **vars(index),
    )  # fmt: skip


def verl_advantages(name: str, scores: Tensor, ids: Tensor, **options: object) -> Tensor:
    compute = getattr(verl(), f"compute_{name}_outcome_advantage")
    return compute(scores[:, None], torch.ones(len(scores), 1), ids.numpy(), **options)[0][:, 0]


def verl_gdpo(scores: Tensor, ids: Tensor, weights: list[float] | None = None) -> Tensor:
    one, names = torch.ones(len(scores), 1), [f"reward{r}" for r in range(scores.size(1))]
    return verl().compute_gdpo_outcome_advantage(
        one, one, ids.numpy(), epsilon=1e-4,
        config={"gdpo_reward_keys": names, "gdpo_reward_weights": weights},
        non_tensor_batch=dict(zip(names, scores.numpy().T, strict=True)),
        batch={"prompts": one, "attention_mask": torch.ones(len(scores), 2, dtype=torch.int64)},
    )[0][:, 0]  # fmt: skip


@cache
def skyrl() -> SimpleNamespace:
    sys.modules.setdefault("loguru", SimpleNamespace(logger=None))  # for a warning that these calls do not give
    names = ("compute_grpo_outcome_advantage", "compute_rloo_outcome_advantage", "compute_maxrl_advantage")
    estimators = SimpleNamespace(GRPO="", RLOO="", MAXRL="", GAE="")
    given = {"register_advantage_estimator": _registered, "AdvantageEstimator": estimators}
    return _load("skyrl", "skyrl/backends/skyrl_train/utils/ppo_utils.py", *names, **given)


def skyrl_advantages(name: str, scores: Tensor, ids: Tensor, **options: object) -> Tensor:
    return getattr(skyrl(), name)(scores[:, None], torch.ones(len(scores), 1), ids.numpy(), **options)[0][:, 0]


@cache
def _statements(package: str, file: str, method: str, first: str, last: str) -> object:
    """The compiled statements of a method's body from the one that begins with ``first`` to that with ``last``."""
    path = distribution(package).locate_file(file)
    tree = ast.parse(path.read_text())
    body = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == method).body
    texts = [ast.unparse(statement) for statement in body]
    begin = next(i for i, text in enumerate(texts) if text.startswith(first))
    end = next(i for i in range(begin, len(texts)) if texts[i].startswith(last))
    return compile(ast.Module(body[begin : end + 1], type_ignores=[]), str(path), "exec")


def trl_advantages(trainer: str, scores: Tensor, group_size: int, weights: Tensor | None = None, **options) -> Tensor:
    """TRL's rewards of several functions, NaN where one has none, for groups that are neighbours."""
    code = _statements(
        "trl", f"trl/trainer/{trainer}_trainer.py", "_generate_and_score_completions",
        "unscorable_mask =", "advantages = torch.nan_to_num",
    )  # fmt: skip
    scores = scores[:, None] if scores.dim() == 1 else scores
    weights = torch.ones(scores.size(1)) if weights is None else weights
    settings = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "beta": 0.0}
    settings |= {"reward_clip_range": None, "normalize_advantages": False} | options
    space = {
        "self": Config(reward_weights=weights, reward_funcs=[None] * scores.size(1), **settings),
        "nanstd": _load("trl", "trl/trainer/utils.py", "nanstd").nanstd,
        "torch": torch, "device": scores.device, "num_generations": group_size, "rewards_per_func": scores.clone(),
    }  # fmt: skip
    exec(code, space)
    return space["advantages"]


def openrlhf_advantages(estimator: str, scores: Tensor, group_size: int) -> Tensor:
    code = _statements(
        "openrlhf", "openrlhf/trainer/ppo_utils/experience_maker.py", "compute_advantages_and_returns",
        "if args.algo.advantage.estimator == 'rloo'", "if args.algo.advantage.estimator == 'rloo'",
    )  # fmt: skip
    algo = SimpleNamespace(advantage=SimpleNamespace(estimator=estimator))
    args = SimpleNamespace(algo=algo, rollout=SimpleNamespace(n_samples_per_prompt=group_size))
    space = {"args": args, "rewards": scores.view(-1, group_size), "torch": torch}
    exec(code, space)
    return space["rewards"].reshape(-1)
