"""Functions that trainers take by a path or a protocol, beside the trainers' formulas written out token by token."""

from __future__ import annotations

import enum
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from ppo_kernels.integrations import megatron, slime
from tests.lib.helpers import NAN

LENGTHS = (5, 1, 8, 3)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Group:
    """A process group of this process alone."""

    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_output_processor_of_megatron(tied, masked):
    """With the arguments that GPTModel._postprocess of megatron-core 0.19.2 passes."""
    s, b, width, vocabulary = 6, 2, 8, 40
    hidden, weight = draw(s, b, width).requires_grad_(), draw(vocabulary, width, seed=1).requires_grad_()
    labels = torch.randint(vocabulary, (b, s), generator=torch.Generator().manual_seed(2))
    loss_mask = (torch.arange(s) < torch.tensor([[4], [6]])).double() if masked else None
    nothing = dict.fromkeys(
        "input_ids position_ids attention_mask decoder_input inference_context packed_seq_params runtime_gather_output"
        " compute_language_model_loss scale_logits".split()
    )
    given = {
        "hidden_states": hidden,
        "output_layer": SimpleNamespace(weight=None if tied else weight, bias=None, tp_group=Group()),
        "output_weight": weight if tied else None,
        "labels": labels,
        "loss_mask": loss_mask,
        "config": SimpleNamespace(sequence_parallel=False, use_mup=tied, mup_output_mult=0.5),
    }
    context = megatron.Head(temperature=0.7, entropy=True)
    found = megatron.output_processor(**given, **nothing, context=context)
    log_p = torch.log_softmax((hidden @ weight.T) * (0.5 if tied else 1.0) / 0.7, -1).transpose(0, 1)
    want = log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    if masked:
        want = tuple(x * loss_mask for x in want)
    for a, c in zip(found, want, strict=True):
        torch.testing.assert_close(a, c)
    seeds = [draw(b, s, seed=3), draw(b, s, seed=4)]
    grads = [torch.autograd.grad(outputs, (hidden, weight), seeds, retain_graph=True) for outputs in (found, want)]
    torch.testing.assert_close(*grads)
    assert torch.is_tensor(megatron.output_processor(**given, **nothing))
    with pytest.raises(ValueError, match="call the model with labels="):
        megatron.output_processor(**given | {"labels": None}, **nothing, context=context)


def rollout(masks):
    rows = [{"kl": draw(n, seed=n).abs(), "values": draw(n, seed=n + 20), "loss_masks": masks[n]} for n in LENGTHS]
    data = {name: [row[name] for row in rows] for name in rows[0]}
    return data | {"rewards": [1.0, -2.0, 0.5, 3.0], "response_lengths": LENGTHS, "total_lengths": [9] * 4}


@pytest.mark.parametrize("estimator", ["ppo", "reinforce_plus_plus"])
@pytest.mark.parametrize("holes", [False, True])
def test_the_advantages_of_slime(estimator, holes):
    """Those of get_advantages_and_returns_batch and get_reinforce_plus_plus_returns of slime/utils/ppo_utils.py."""
    gamma, lam, kl_coef = 0.97, 0.9, 0.1
    args = SimpleNamespace(advantage_estimator=estimator, gamma=gamma, lambd=lam, kl_coef=kl_coef)
    args.context_parallel_size = 1
    masks = {n: torch.ones(n) for n in LENGTHS}
    if holes:
        masks[5][[1, 4]] = masks[8][[0, 5, 6, 7]] = 0.0
    data = rollout(masks)
    garbage = [
        torch.where((mask != 0) | (estimator == "ppo"), kl, NAN)
        for kl, mask in zip(data["kl"], data["loss_masks"], strict=True)
    ]
    given = data | {"kl": garbage}
    slime.compute_advantages_and_returns(args, given)
    data |= {name: given[name] for name in ("advantages", "returns")}
    for i, n in enumerate(LENGTHS):
        kl, values = data["kl"][i].tolist(), [*data["values"][i].tolist(), 0.0]
        mask, ahead = masks[n].tolist(), 0.0
        is_ppo = estimator == "ppo"
        end = n - 1 if is_ppo else max(t for t in range(n) if mask[t])
        want = [0.0] * n
        for t in reversed(range(n)):
            reward = -kl_coef * kl[t] * (1.0 if is_ppo else mask[t]) + (data["rewards"][i] if t == end else 0.0)
            step = reward + gamma * values[t + 1] - values[t] if is_ppo else reward
            want[t] = ahead = step + gamma * (lam if is_ppo else 1.0) * ahead
        advantages, returns = data["advantages"][i], data["returns"][i]
        torch.testing.assert_close(advantages.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        plus = data["values"][i] if is_ppo else 0.0
        torch.testing.assert_close(returns.double(), advantages.double() + plus, rtol=1e-5, atol=1e-6)


def test_what_slime_computes_itself_is_refused():
    args = SimpleNamespace(advantage_estimator="grpo", context_parallel_size=1)
    with pytest.raises(
        ValueError, match="must be ppo or reinforce_plus_plus, got grpo; leave --custom-advantage-function"
    ):
        slime.compute_advantages_and_returns(args, {})
    args = SimpleNamespace(advantage_estimator="ppo", context_parallel_size=2)
    with pytest.raises(ValueError, match="on 2 ranks; set --context-parallel-size 1"):
        slime.compute_advantages_and_returns(args, {})


def test_a_response_without_a_token_for_its_reward_is_refused():
    """slime raises there too; the reward went to the response before."""
    ppo, returns = (
        SimpleNamespace(advantage_estimator=name, context_parallel_size=1, kl_coef=0.0, gamma=1.0, lambd=1.0)
        for name in ("ppo", "reinforce_plus_plus")
    )

    def given(lengths, masked=(), rewards=3):
        rows = {name: [torch.zeros(n) for n in lengths] for name in ("kl", "values")}
        masks = [torch.full((n,), 0.0 if i in masked else 1.0) for i, n in enumerate(lengths)]
        return rows | {"loss_masks": masks, "rewards": [10.0, -7.0, 3.0][:rewards]}

    for args in (ppo, returns):
        for lengths, row in (((2, 0, 3), 1), ((0, 2, 2), 0), ((2, 2, 0), 2)):
            with pytest.raises(ValueError, match=f"response {row} of 3 has no tokens"):
                slime.compute_advantages_and_returns(args, given(lengths))
        with pytest.raises(ValueError, match="3 responses need a reward each, got 1"):
            slime.compute_advantages_and_returns(args, given((2, 1, 3), rewards=1))
    for masked in ((1,), (1, 2), (2,)):
        with pytest.raises(ValueError, match=f"response {masked[0]} of 3 is fully masked"):
            slime.compute_advantages_and_returns(returns, given((2, 1, 3), masked))
    data = given((2, 1, 3), (1,))
    slime.compute_advantages_and_returns(ppo, data)
    assert [row.tolist() for row in data["advantages"]] == [[10.0] * 2, [-7.0], [3.0] * 3]


CLIPPED = {
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.1,
    "ratio_clip_max": 0.25,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.3,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}
BY_ROWS = {"token_level_loss": False, "sequence_level_importance_ratios": True}


def truncated(kind, low, high):
    options = {"type": kind, "ratio_min": low, "ratio": high}
    names = {f"truncated_importance_sampling_{name}": value for name, value in options.items()}
    return names | {"use_importance_sampling_correction": True}


@pytest.fixture
def nemo(monkeypatch):
    """The names of its interfaces, with its values."""
    kinds = {
        "LossType": ("token_level", "sequence_level"),
        "LossInputType": ("logit", "logprob"),
        "MetricNormalizer": ("tokens", "sequences", "none"),
    }
    interfaces = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    for name, values in kinds.items():
        setattr(interfaces, name, enum.Enum(name, {value.upper(): value for value in values}))
    for package in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    from ppo_kernels.integrations.nemo_rl import ClippedPGLoss

    return lambda **settings: ClippedPGLoss(SimpleNamespace(**CLIPPED | settings))


def nemo_batch(kind):
    rows, length, far = 4, 7, 60.0 if kind == "far" else 1.0
    old = -2.0 * draw(rows, length + 1, seed=1).abs() - 0.05
    near = lambda seed, size: old + size * draw(rows, length + 1, seed=seed)  # noqa: E731
    mask = (torch.arange(length + 1) < torch.tensor([[8], [3], [6], [8]])) & (draw(rows, length + 1, seed=9) < 1.0)
    mask[:, 1] = True
    generation, samples = near(3, 0.3), [1.0, 1.0, 0.0, 1.0]
    if kind == "infinite":
        generation[0, 1] = -torch.inf
        generation[1, 1] -= 800.0
    if kind == "weighted":
        samples = [1.0, 0.5, 0.0, 2.0]
        mask[3] = False
    return near(2, 0.4)[:, 1:], {
        "prev_logprobs": old,
        "generation_logprobs": generation,
        "reference_policy_logprobs": near(4, 0.3 * far),
        "advantages": draw(rows, length + 1, seed=5),
        "token_mask": mask.double(),
        "sample_mask": torch.tensor(samples, dtype=torch.float64),
    }


def finite(x):
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def truncate(cfg, weight, kept):
    """And whether it was out of bounds."""
    high, low = cfg.truncated_importance_sampling_ratio, cfg.truncated_importance_sampling_ratio_min or 0.0
    match cfg.truncated_importance_sampling_type:
        case "tis":
            return min(max(weight, low), high), not low <= weight <= high
        case "icepop":
            return weight if low <= weight <= high else 0.0, not low <= weight <= high
        case "seq-mask-tis":
            return weight if kept else 0.0, not kept
    return weight, False


def nemo_loss(cfg, logprobs, data, seqs, toks):
    """ClippedPGLossFn.__call__ of nemo_rl/algorithms/loss/loss_functions.py, a token at a time, with its KL and the
    metrics that say what the loss did."""
    shifted = {name: x[:, 1:] for name, x in data.items() if x.dim() == 2}
    total = kl_total = ratios = weights = outside = 0.0
    by_rows = cfg.sequence_level_importance_ratios
    by_sequence = cfg.truncated_importance_sampling_type == "seq-mask-tis"
    low, high = cfg.truncated_importance_sampling_ratio_min, cfg.truncated_importance_sampling_ratio
    for b, sample in enumerate(data["sample_mask"].tolist()):
        if not sample:
            continue
        where = [t for t in range(logprobs.size(1)) if shifted["token_mask"][b, t]]
        old, behaviour = shifted["prev_logprobs"][b], shifted["generation_logprobs"][b]
        of_row = (logprobs[b] - old)[where].mean().exp()
        mismatch = (old - behaviour)[where]
        of_sequence = finite((mismatch * sample).sum().exp()).item()
        geometric = (finite(mismatch).sum() / max(len(where), 1)).exp()
        kept = not by_sequence or bool(low <= geometric <= high)
        if by_sequence:
            outside += sample * (not kept) / seqs.item()
        if by_rows:  # the mean over sequences: there [B, 1] is multiplied by [B]
            weights += sample * truncate(cfg, of_sequence, kept)[0] / seqs.item()
        share = sample / toks if cfg.token_level_loss else sample / max(len(where), 1) / seqs
        for t in where:
            log_p, a = logprobs[b, t], shifted["advantages"][b, t]
            ratio = of_row if by_rows else (log_p - old[t]).exp()
            if cfg.force_on_policy_ratio:
                ratio = (log_p - log_p.detach()).exp()
            clipped = ratio.clamp(1 - cfg.ratio_clip_min, 1 + cfg.ratio_clip_max)
            loss = torch.maximum(-a * ratio, -a * (ratio if cfg.force_on_policy_ratio else clipped))
            if cfg.use_cispo:
                loss = -a * clipped.detach() * log_p
            if cfg.disable_ppo_ratio and not cfg.force_on_policy_ratio:
                loss, ratio = -a * log_p, log_p
            if cfg.ratio_clip_c is not None and a < 0:
                loss = torch.minimum(loss, -a * cfg.ratio_clip_c)
            w = of_sequence if by_rows else finite((old[t] - behaviour[t]).exp()).item()
            w, out = truncate(cfg, w, kept)
            outside += 0.0 if by_sequence else sample * out / toks.item()
            weights += 0.0 if by_rows else sample * w / toks.item()
            ratios += sample * ratio.item() / toks.item()
            total = total + share * loss * (w if cfg.use_importance_sampling_correction else 1.0)
            base = behaviour[t] if cfg.use_on_policy_kl_approximation else log_p.detach()
            d = shifted["reference_policy_logprobs"][b, t] - log_p
            inside = abs(d.item()) <= cfg.kl_input_clamp_value
            d = d.clamp(-cfg.kl_input_clamp_value, cfg.kl_input_clamp_value)
            k = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[cfg.reference_policy_kl_type]
            weight = (log_p - base).exp()
            if not weight.isfinite():  # there its gradient is NaN
                weight = torch.zeros(())
            k = k * (weight if inside else weight.detach())
            kl_total = kl_total + share * k.clamp(-cfg.kl_output_clamp_value, cfg.kl_output_clamp_value)
    coef = 0.0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty
    metrics = {"probs_ratio": ratios, "kl_penalty": kl_total.item() if coef else 0.0}
    metrics["sampling_importance_ratio"] = weights
    if cfg.truncated_importance_sampling_type:
        metrics["is_oob_ratio"] = outside
    return total + coef * kl_total, metrics


@pytest.mark.parametrize("kind", ["near", "far", "infinite", "weighted"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio_clip_c": 1.5, "reference_policy_kl_type": "k2"},
        {"token_level_loss": False, "reference_policy_kl_type": "k1", "use_on_policy_kl_approximation": True},
        {"reference_policy_kl_type": "k1", "kl_input_clamp_value": 3.0, "kl_output_clamp_value": 99.0},
        BY_ROWS,
        BY_ROWS | {"use_importance_sampling_correction": True},
        BY_ROWS | truncated("tis", None, 1.1),
        BY_ROWS | truncated("icepop", 0.9, 2.5),
        BY_ROWS | truncated("icepop", 0.5, 2.5) | {"force_on_policy_ratio": True},
        {"use_cispo": True, "use_kl_in_reward": True},
        {"disable_ppo_ratio": True},
        {"force_on_policy_ratio": True, "ratio_clip_c": 3.0},
        {"force_on_policy_ratio": True, "disable_ppo_ratio": True},
        truncated("tis", 0.8, 1.2),
        truncated("icepop", 0.8, 1.2),
        truncated("seq-mask-tis", 0.9, 1.1),
    ],
    ids=str,
)
def test_the_clipped_loss_of_nemo_rl(nemo, settings, kind):
    loss_fn = nemo(**settings)
    logprobs, data = nemo_batch(kind)
    if loss_fn.cfg.force_on_policy_ratio:
        data["prev_logprobs"] = torch.cat([data["prev_logprobs"][:, :1], logprobs], 1)
    found = []
    live = (data["token_mask"] * data["sample_mask"][:, None]) != 0
    garbage = {
        name: torch.where(live, x, NAN) if name.endswith(("logprobs", "advantages")) else x for name, x in data.items()
    }
    for call, given in ((loss_fn, garbage), (lambda *a: nemo_loss(loss_fn.cfg, *a), data)):
        leaf = torch.where(live[:, 1:] | (given is data), logprobs, NAN).requires_grad_()
        loss, metrics = call(leaf, given, torch.tensor(5.0), torch.tensor(31.0))
        found.append((loss.double(), torch.autograd.grad(loss, leaf)[0], metrics))
    (ours, our_grad, our_metrics), (theirs, their_grad, metrics) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-7)
    assert {name: our_metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    assert our_metrics["loss"] == pytest.approx(theirs.item(), rel=1e-6, abs=1e-7)
    assert set(our_metrics) == set(loss_fn.metric_normalizations)


def test_what_is_not_covered_is_refused(nemo):
    tis = "truncated_importance_sampling"
    for settings, said in (
        ({"positive_example_nll_weight": 0.1}, "take ClippedPGLossFn"),
        ({"disable_ppo_ratio": True, "ratio_clip_c": 3.0}, "set ratio_clip_c to null"),
        ({"sequence_level_importance_ratios": True}, "needs token_level_loss false"),
        ({"ratio_clip_c": 1.0}, "ratio_clip_c must be above 1, or null for no dual clip, got 1.0"),
        ({"reference_policy_kl_type": "k4"}, "must be k1, k2 or k3, got 'k4'"),
        (truncated("icepopp", 0.5, 2.0), f"{tis}_type must be tis, icepop, seq-mask-tis or null, got 'icepopp'"),
        (truncated("tis", None, 2.0) | {"use_importance_sampling_correction": False}, "correction true; set it"),
        (truncated("tis", None, None), f"{tis}_ratio must be above 0 with {tis}_type tis, got None"),
        (truncated("tis", None, 0.0), f"{tis}_ratio must be above 0 with {tis}_type tis, got 0.0"),
        (truncated("tis", 3.0, 2.0), f"{tis}_ratio_min must be at most {tis}_ratio 2.0, got 3.0"),
        (truncated("icepop", None, 2.0), f"{tis}_ratio_min must be set with {tis}_type icepop, got None"),
        (truncated("seq-mask-tis", None, 2.0), f"{tis}_ratio_min must be set with {tis}_type seq-mask-tis, got None"),
        (truncated("seq-mask-tis", 0.5, 2.0) | BY_ROWS, "weighs by token, got sequence_level_importance_ratios true"),
        (truncated(None, None, 2.0), f"{tis}_ratio 2.0 and {tis}_ratio_min None are read with {tis}_type alone"),
        (truncated(None, 0.5, None), f"{tis}_ratio None and {tis}_ratio_min 0.5 are read with {tis}_type alone"),
        *(
            ({"use_cispo": True} | other, f"use_cispo needs {said}; set it to")
            for other, said in (
                ({"disable_ppo_ratio": True}, "disable_ppo_ratio false, got True"),
                ({"force_on_policy_ratio": True}, "force_on_policy_ratio false, got True"),
                (BY_ROWS, "sequence_level_importance_ratios false, got True"),
                ({"ratio_clip_c": 3.0}, "ratio_clip_c null, got 3.0"),
                ({"token_level_loss": False}, "token_level_loss true, got False"),
            )
        ),
    ):
        with pytest.raises(ValueError, match=said):
            nemo(**settings)
