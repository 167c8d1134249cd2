"""TRL's own functions and its trainers, with our functions in place and without."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

from bench.trainers import REWARD, make_inputs
from ppo_kernels import integrations
from tests.verify.adapters.lib import both, close, draw, grad, load

load("trl", "trl.trainer.utils")

V = 97


def utils():
    import trl.trainer.utils

    return trl.trainer.utils


@pytest.mark.parametrize("shape", [(40, V), (4, 10, V)])
@pytest.mark.parametrize("many", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(shape, many, temperature, dtype, masked):
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, V, shape[:-1] if many is None else (*shape[:-1], many), generator=g)
    mask = torch.rand(index.shape, generator=g) < 0.7 if masked else None
    logits, weights = draw(*shape, scale=3.0).to(dtype), torch.randn(index.shape, generator=g)
    widen = iter((True, False))  # theirs rounds to bfloat16; ours is as exact as theirs is in float32

    def call():
        leaf = logits.clone().requires_grad_()
        given = leaf.float() if next(widen) else leaf
        logprobs = utils().selective_log_softmax(given, index, temperature, mask)
        return logprobs, grad((logprobs * weights).sum(), leaf)

    ours, theirs = both("trl", call, {"selective_log_softmax": 1})
    close(ours[0], theirs[0], atol=5e-6)
    close(ours[1], theirs[1], rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=5e-6)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_logprobs_and_entropy(requires_grad, temperature, masked):
    index = torch.randint(0, V, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < torch.tensor([[3], [10], [7], [0]])).long() if masked else None
    logits, weights = draw(4, 10, V, scale=3.0), draw(2, 4, 10, seed=1)

    def call():
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = utils().selective_log_softmax_and_entropy(leaf, index, requires_grad, temperature, mask)
        assert entropy.requires_grad == requires_grad
        return logprobs, entropy, grad((logprobs * weights[0]).sum() + (entropy * weights[1]).sum(), leaf)

    close(*both("trl", call, {"selective_log_softmax_and_entropy": 1}), rtol=1e-5, atol=5e-6)


def test_entropy():
    logits, weights = draw(4, 10, V, scale=3.0), draw(4, 10, seed=1)

    def call():
        leaf = logits.clone().requires_grad_()
        entropy = utils().entropy_from_logits(leaf)
        return entropy, grad((entropy * weights).sum(), leaf)

    close(*both("trl", call, {"entropy_from_logits": 1}), rtol=1e-5, atol=5e-6)


OUTPUTS = {
    "GRPO, RLOO": ("log_probs", "entropy"),
    "a reference": ("log_probs",),
    "SFT": ("log_probs", "entropy", "is_top1"),
    "KTO": ("log_probs", "entropy", "mean_logits"),
}


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_fused_head(outputs, with_bias, dtype, scale):
    """In float32 the same numbers; in bfloat16, where both round logits, no farther from float64 than theirs."""
    n, h = 50, 24
    parts = [draw(n, h).to(dtype), draw(V, h, seed=1).to(dtype), draw(V, seed=2).to(dtype) if with_bias else None]
    targets = torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(0))
    targets[:20] = (parts[0] @ parts[1].T)[:20].argmax(-1)  # some labels are the most likely token
    grads = draw(2, n, seed=3)

    def results(function, dtype):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in parts]
        found = function(*leaves)
        loss = (found[0] * grads[0]).sum() + (0 if found[1] is None else (found[1] * grads[1]).sum())
        return found, torch.autograd.grad(loss, [x for x in leaves if x is not None])

    def head(*leaves):
        return utils()._ChunkedLogProbFunction.apply(*leaves, targets, 0.7, 40, None, scale, OUTPUTS[outputs])

    def exact(hidden, weight, bias):
        logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale / 0.7
        logprobs = torch.log_softmax(logits, -1)
        entropy = -(logprobs.exp() * logprobs).sum(-1) if "entropy" in OUTPUTS[outputs] else None
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    ours, theirs = both("trl", lambda: results(head, dtype), {"ChunkedLogProbFunction.apply": 1})
    if dtype == torch.float32:
        close(ours, theirs, rtol=1e-5, atol=6e-5)  # theirs is up to 3e-5 away from float64 in a gradient, ours 7e-6
        return
    assert [x is None for x in ours[0]] == [x is None for x in theirs[0]]
    values, gradients = results(exact, torch.float64)
    for a, b, c in zip((*ours[0][:2], *ours[1]), (*theirs[0][:2], *theirs[1]), (*values, *gradients), strict=True):
        if c is not None:
            error, allowed = ((x.double() - c).abs().mean() for x in (a, b))
            assert error <= 1.05 * allowed


def test_the_head_that_trainers_add_to_a_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=V)
    model = GPT2LMHeadModel(config).eval()
    utils().add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(0, V, (3, 12))
    labels = ids.clone()
    labels[0, :5] = labels[2, 9:] = -100

    def call():
        model.zero_grad()
        out = model(ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.01 * out.entropy.sum()).backward()
        return out.loss.detach(), out.log_probs, out.entropy, [p.grad.clone() for p in model.parameters()]

    close(*both("trl", call, {"ChunkedLogProbFunction.apply": 1}), rtol=1e-4, atol=1e-5)


def test_what_is_not_covered_is_left_to_trl():
    adapter = integrations.adapter("trl")
    adapter.apply()
    adapter.reset_status()
    hidden, weight = draw(5, 8).requires_grad_(), draw(V, 8)
    apply = utils()._ChunkedLogProbFunction.apply
    targets = torch.zeros(5, dtype=torch.int64)
    capped = apply(hidden, weight, None, targets, 1.0, 40, 30.0, 1.0, ("log_probs",))[0]
    squares = apply(hidden, weight, None, targets, 1.0, 40, None, 1.0, ("log_probs", "log_sum_sq_probs"))[2]
    status = adapter.status()
    adapter.revert()
    logits = (hidden @ weight.T).detach()
    close(capped.detach(), torch.log_softmax(30 * torch.tanh(logits / 30), -1)[:, 0], atol=5e-6)
    close(squares, torch.log_softmax(logits, -1).mul(2).logsumexp(-1), atol=5e-6)
    reasons = {"logits with a soft cap": 1, "log_sum_sq_probs": 1}
    assert status == {"ChunkedLogProbFunction.apply": {"served": 0, "not covered": reasons}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, 200)
    return folder


STEPS = 4
COMMON = {
    "learning_rate": 1e-4,
    "max_steps": STEPS,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 8,
}
ROLLOUT = {"num_generations": 4, "max_completion_length": 16, "beta": 0.05, "num_iterations": 2}


def trainer(name, folder, **changes):
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()][:40]
    reward: dict = {}
    exec(REWARD, reward)
    if name in ("GRPO", "RLOO"):
        settings, more = ROLLOUT, {"reward_funcs": reward["different"]}
    elif name in ("DPO", "CPO", "ORPO"):
        rows = [{**row, "chosen": " w1 w2 w3", "rejected": f" w{i} w{i + 1}"} for i, row in enumerate(rows)]
        settings, more = {"beta": 0.1}, {}
    else:
        rows = [{"text": row["prompt"]} for row in rows]
        settings, more = {}, {}
    model, home = str(folder / "model"), trl
    if name in ("CPO", "ORPO"):
        home = importlib.import_module(f"trl.experimental.{name.lower()}")
        more = {"processing_class": AutoTokenizer.from_pretrained(model)}
        model = AutoModelForCausalLM.from_pretrained(model)
    args = getattr(home, f"{name}Config")(output_dir=str(folder / name), **COMMON | settings | changes)
    return getattr(home, f"{name}Trainer")(model=model, args=args, train_dataset=Dataset.from_list(rows), **more)


RUNS = {
    "GRPO": {},
    "GRPO dapo": {"loss_type": "dapo", "temperature": 0.7, "epsilon_high": 0.3},
    "GRPO sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "RLOO": {"num_iterations": 1},  # a second update of these rollouts is clipped in every sequence
    "DPO": {},
    "SFT": {},
    "CPO": {},
    "ORPO": {},
}


@pytest.mark.parametrize("run", RUNS)
def test_trainers_take_the_same_steps(run, inputs):
    """Losses, gradient norms, entropies and rewards, and so the rollouts: other tokens have another loss."""
    name = run.split()[0]
    adapter = integrations.adapter("trl")

    def steps():
        made = trainer(name, inputs, **RUNS[run])
        made.train()
        wanted = ("loss", "grad_norm", "reward", "entropy", "kl", "mean_token_accuracy", "rewards/margins")
        return [{k: v for k, v in row.items() if k in wanted} for row in made.state.log_history if "loss" in row]

    theirs = steps()
    adapter.apply()
    adapter.reset_status()
    try:
        ours = steps()
        status = adapter.status()
    finally:
        adapter.revert()
    assert len(theirs) == STEPS
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in theirs)
    close(ours, theirs, rtol=2e-4, atol=2e-5)
    (counts,) = status.values()
    bound = name in ("CPO", "ORPO")  # their modules have bound the name before
    assert list(status) == ["selective_log_softmax" if bound else "ChunkedLogProbFunction.apply"]
    assert counts["served"] >= STEPS
    assert not counts["not covered"]
