"""What a trainer's own calls cost with the adapter and without: ``python -m tests.verify.adapters.speed [NAME]``.

Each line is a call of the trainer's code on this machine's CPU. With and without take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bench import trainers
from bench.results import Table, times
from ppo_kernels import integrations
from tests.verify.adapters import lib

ROUNDS = 5
Call = Callable[[], object]


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    draw = [lib.draw(rows, length, seed=i) for i in range(5)]
    names = ("token_level_rewards", "token_level_scores", "old_log_probs", "ref_log_prob", "values")
    lengths = torch.randint(length // 4, length + 1, (rows, 1), generator=torch.Generator().manual_seed(0))
    return {**dict(zip(names, draw, strict=True)), "response_mask": (torch.arange(length) < lengths).long()}


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, vocabulary, (1, rows), generator=torch.Generator().manual_seed(0))
    return lib.draw(1, rows, vocabulary, scale=2.0).to(dtype).requires_grad_(), labels


def verl() -> dict[str, Call]:
    files = ("trainer.ppo.core_algos", "trainer.ppo.ray_trainer", "utils.torch_functional")
    core, trainer, tensors = lib.load("verl", *(f"verl.{name}" for name in files))
    (heads,) = lib.load("verl", "verl.utils.experimental.torch_functional")
    from verl import DataProto
    from verl.trainer.config import AlgoConfig
    from verl.workers.config import ActorConfig

    rows, length = 512, 2048
    uids = np.repeat([f"prompt {i}" for i in range(rows // 8)], 8)
    batch, config = tokens(rows, length), AlgoConfig(gamma=1.0, lam=0.95)
    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2)
    logits, labels = logits_of(1024, 32000, torch.float32)
    new = batch["old_log_probs"][:64].clone().requires_grad_()

    def data() -> DataProto:
        return DataProto.from_dict(tensors=dict(batch), non_tensors={"uid": uids})

    hidden, weight = (lib.draw(n, 256, seed=n).requires_grad_() for n in (1024, 32000))

    def policy(name: str) -> None:
        old, advantages, mask = (batch[k][:64] for k in ("ref_log_prob", "values", "response_mask"))
        loss, _ = core.get_policy_loss_fn(name)(old, new, advantages, mask.bool(), "token-mean", actor)
        loss.backward()

    def head() -> None:
        sum(x.sum() for x in heads.FusedLinearForPPO()(hidden, weight, labels[0], 0.7)).backward()

    def logprobs() -> None:
        tensors.logprobs_from_logits(logits * 1, labels).sum().backward()

    shape = f"[{rows}, {length}]"
    return {
        f"compute_advantage gae {shape}": lambda: trainer.compute_advantage(data(), "gae", 1.0, 0.95, config=config),
        f"compute_advantage grpo {shape}": lambda: trainer.compute_advantage(data(), "grpo", config=config),
        f"compute_advantage reinforce_plus_plus {shape}": lambda: trainer.compute_advantage(
            data(), "reinforce_plus_plus", config=config
        ),
        f"apply_kl_penalty low_var_kl {shape}": lambda: trainer.apply_kl_penalty(
            data(), core.FixedKLController(0.1), "low_var_kl"
        ),
        f"policy loss and its gradient [64, {length}]": lambda: policy("vanilla"),
        f"policy loss geo_mean and its gradient [64, {length}]": lambda: policy("geo_mean"),
        "the fused head of FSDP and its gradient [1024, 256] x [256, 32000]": head,
        "logprobs_from_logits and its gradient [1024, 32000]": logprobs,
        "entropy_from_logits [1024, 32000]": lambda: tensors.entropy_from_logits(logits.detach()),
    }


def openrlhf() -> dict[str, Call]:
    files = ("trainer.ppo_utils.experience_maker", "trainer.ppo_utils.experience", "models.utils")
    maker, experience, utils = lib.load("openrlhf", *(f"openrlhf.{name}" for name in files))
    rows, length = 512, 2048
    batch = tokens(rows, length)
    logits, labels = logits_of(1024, 32000, torch.float32)

    def advantages(estimator: str) -> Call:
        made = object.__new__(maker.RemoteExperienceMaker)
        advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.95, no_std_norm=False)
        reward = SimpleNamespace(clip_range=(-10.0, 10.0), overlong_buffer_len=None, stop_properly_penalty_coef=None)
        rollout = SimpleNamespace(n_samples_per_prompt=8)
        made.strategy = SimpleNamespace(
            args=SimpleNamespace(algo=SimpleNamespace(advantage=advantage), rollout=rollout, reward=reward)
        )
        made.advantage_estimator, made.kl_ctl = estimator, SimpleNamespace(value=0.1)

        def call() -> None:
            kl = utils.compute_approx_kl(batch["old_log_probs"], batch["ref_log_prob"], kl_estimator="k3")
            one = experience.Experience(
                index=list(range(rows)),
                rewards=lib.draw(rows),
                action_mask=batch["response_mask"].bool(),
                values=batch["values"],
                kl=kl,
            )
            made.compute_advantages_and_returns([one])

        return call

    def logprobs() -> None:
        utils.log_probs_from_logits(logits, labels).sum().backward()

    return {
        f"KL, rewards, GAE, whitening of an experience [{rows}, {length}]": advantages("gae"),
        f"the same, reinforce_baseline [{rows}, {length}]": advantages("reinforce_baseline"),
        "log_probs_from_logits and its gradient [1024, 32000]": logprobs,
    }


def trl() -> dict[str, Call]:
    (utils,) = lib.load("trl", "trl.trainer.utils")
    calls: dict[str, Call] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        logits, labels = logits_of(512, 32000, dtype)
        hidden, weight = (lib.draw(n, 256, seed=n).to(dtype).requires_grad_() for n in (1024, 32000))
        targets = torch.randint(0, 32000, (1024,), generator=torch.Generator().manual_seed(0))

        def logprobs(logits=logits, labels=labels) -> None:
            utils.selective_log_softmax(logits, labels, 0.7).sum().backward()

        def head(hidden=hidden, weight=weight, targets=targets) -> None:
            arguments = (hidden, weight, None, targets, 0.7, 32768, None, 1.0, ("log_probs", "entropy"))
            utils._ChunkedLogProbFunction.apply(*arguments)[0].sum().backward()

        calls[f"selective_log_softmax and its gradient, {name} [512, 32000]"] = logprobs
        calls[f"the fused head of GRPO and its gradient, {name} [1024, 256] x [256, 32000]"] = head
    calls["GRPOTrainer.compute_loss and backward, 8 x 64 tokens, 32000 words, whole model"] = grpo_loss()
    return calls


def grpo_loss() -> Call:
    """GRPOTrainer's loss and backward of a rollout: GPT-2 of 4 layers and 256 channels, 8 responses of 64 tokens."""
    import trl
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as place:
        trainers.make_inputs(Path(place), 32000)
        reward: dict = {}
        exec(trainers.REWARD, reward)
        args = trl.GRPOConfig(
            output_dir=place,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=64,
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        )
        rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)])
        made = trl.GRPOTrainer(model=f"{place}/model", args=args, reward_funcs=reward["different"], train_dataset=rows)
        batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    return lambda: made.compute_loss(made.model, batch).backward()


def skyrl() -> dict[str, Call]:
    (ppo,) = lib.load("skyrl", "skyrl.backends.skyrl_train.utils.ppo_utils")
    batch = tokens(512, 2048)
    names = ("token_level_rewards", "response_mask", "values")

    def advantages() -> None:
        given = {name: batch[name] for name in names}
        ppo.compute_advantages_and_returns(**given, index=None, adv_estimator="gae", config=None)

    return {"compute_advantages_and_returns gae [512, 2048]": advantages}


def measure(adapter: integrations.Adapter, call: Call) -> tuple[float, float]:
    """Seconds with the adapter and without: medians of turns after one of each that is not timed."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(ROUNDS + 1):
        for ours in (True, False):
            if ours:
                adapter.apply()
            before = adapter.status()
            begin = time.perf_counter()
            call()
            if turn:
                seconds[ours].append(time.perf_counter() - begin)
            assert ours or adapter.status() == before, f"a call without the adapter reached ours: {adapter.status()}"
            adapter.revert()
    return statistics.median(seconds[True]), statistics.median(seconds[False])


def main(only: str = "") -> None:
    table = Table("With an adapter", "", ["trainer", "call", "its own", "ours", "ratio"])
    for make in (verl, openrlhf, trl, skyrl):
        adapter = integrations.adapter(make.__name__)
        calls = {name: call for name, call in make().items() if only in f"{make.__name__} {name}"}
        for name, call in calls.items():
            adapter.reset_status()
            ours, theirs = measure(adapter, call)
            counts = adapter.status()
            assert all(not one["not covered"] for one in counts.values()), counts
            assert counts, f"no call of {name} came to us"
            cells = [f"{1e3 * x:.1f} ms" for x in (theirs, ours)]
            table.lines.append([f"{make.__name__} {version(adapter.distribution)}", name, *cells, times(theirs / ours)])
            print(table.lines[-1], file=sys.stderr, flush=True)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{table.markdown()}\n")
    print(f"Medians of {ROUNDS} turns; torch {torch.__version__}, {torch.get_num_threads()} threads,", end=" ")
    print(f"load averages {load} on {os.cpu_count()} cores.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.verify.adapters.speed", description=__doc__)
    parser.add_argument("only", nargs="?", default="", help="calls whose trainer and name contain this")
    main(parser.parse_args().only)
