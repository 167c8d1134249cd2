"""What the pairwise policy loss refuses, and what it survives."""

import pytest
import torch

from ppo_kernels import p3o_loss
from tests.lib.checks import pairs_of_responses as make
from tests.lib.helpers import assert_raises

OP = "p3o_loss"


@pytest.mark.parametrize("bounds", [[-5, 3, 12], [0, 100, 7], [2**40, -(2**40), 12], [3, 3, 3], [12, 0, 12, 0, 5]])
def test_wrong_cu_seqlens_never_read_outside(impl, bounds):
    x, call = torch.randn(12), {"cu_seqlens": torch.tensor(bounds)}
    scores = torch.randn(len(bounds) - 1)
    assert p3o_loss(x, x, x, scores, impl=impl, **call)[0].isfinite()
    assert_raises(ValueError, lambda: p3o_loss(x, x, x, scores, validate=True, impl=impl, **call), "cu_seqlens", "12")


@pytest.mark.parametrize("bounds", [[3, 7, 9], [0, 5, 5], [9, 9, 9], [0]])
def test_packed_tokens_of_no_row_have_no_gradient(impl, bounds):
    logp, old, ref = torch.randn(3, 12).unbind()
    logp = logp.clone().requires_grad_()
    p3o_loss(logp, old, ref, torch.randn(len(bounds) - 1), cu_seqlens=torch.tensor(bounds), impl=impl)[0].backward()
    assert logp.grad.isfinite().all()
    assert not logp.grad[: bounds[0]].any()
    assert not logp.grad[bounds[-1] :].any()


WRONG = [
    ({"variant": "both"}, ValueError, ("variant", "joint", "separate", "both")),
    ({"group_size": 1}, ValueError, ("group_size", ">= 2", "1")),
    ({"group_size": 2.0}, TypeError, ("group_size", "integer", "float")),
    ({"group_size": True}, TypeError, ("group_size", "integer", "bool")),
    ({"group_size": 3}, ValueError, ("4 rows", "group_size=3")),
    ({"cliprange": -0.1}, ValueError, ("cliprange", "0", "-0.1")),
    ({"weight_clip": 0.5}, ValueError, ("weight_clip", "1", "0.5")),
    ({"weight_clip": "off"}, TypeError, ("weight_clip", "number", "str")),
    ({"log_ratio_clamp": -1.0}, ValueError, ("log_ratio_clamp", "-1.0")),
    ({"kl_coef": torch.ones(2)}, ValueError, ("kl_coef", "(2,)")),
    ({"logprobs": torch.randn(12)}, ValueError, ("logprobs", "[B, T]", "(12,)")),
    ({"old_logprobs": torch.randn(3, 4)}, ValueError, ("old_logprobs", "(4, 3)", "(3, 4)")),
    ({"ref_logprobs": None}, TypeError, ("ref_logprobs", "Tensor", "NoneType")),
    ({"scores": torch.randn(2)}, ValueError, ("scores", "(4,)", "(2,)")),
    ({"scores": torch.ones(4, dtype=torch.bool)}, TypeError, ("scores", "bool")),
    ({"mask": torch.ones(3, 4)}, ValueError, ("mask", "(4, 3)", "(3, 4)")),
    ({"normalizer": -1.0}, ValueError, ("normalizer", "-1.0")),
    ({"scores": torch.randn(4, device="meta")}, ValueError, ("scores", "meta", "cpu")),
    ({"impl": "nonsense"}, ValueError, ("nonsense", "torch")),
]


@pytest.mark.parametrize(("change", "error", "mentions"), WRONG)
def test_wrong_arguments_are_named(impl, change, error, mentions):
    names = ("logprobs", "old_logprobs", "ref_logprobs", "scores")
    arguments = dict(zip(names, make(4, 3), strict=True)) | {"impl": impl}
    assert_raises(error, lambda: p3o_loss(**(arguments | change)), *mentions)
