"""Plain CPU tensors go to their kernel past the checks of other calls; ``validate=True`` goes through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ppo_kernels
from ppo_kernels import backends
from tests.lib import cases
from tests.lib.recorded import bare_inputs

pytestmark = pytest.mark.skipif(backends.op("gae").implementations("cpu")[0] != "cpu", reason="no C++ ops")

TOKENS = ("rewards", "values", "old_values", "returns", "logprobs", "old_logprobs", "advantages", "ref_logprobs")
#: Inputs that no longer fit the others, or fit only after a conversion.
ODD: dict[str, Callable[[torch.Tensor], object]] = {
    "fewer rows": lambda x: x[:3],
    "fewer columns": lambda x: x[..., :2],
    "one row": lambda x: x[0],
    "one column": lambda x: x[..., :1],
    "one dimension less": lambda x: x[..., 0],
    "one dimension more": lambda x: x[None],
    "the same number in another shape": lambda x: x.reshape(2, -1),
    "transposed": lambda x: x.t() if x.dim() == 2 else x[:, None],
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "float64": lambda x: x.to(torch.float64),
    "int32": lambda x: x.to(torch.int32),
    "bool": lambda x: x.to(torch.bool),
    "uint8": lambda x: (x != 0).to(torch.uint8),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "requires grad": lambda x: x.clone().requires_grad_(x.is_floating_point()),
    "a list": lambda x: x.tolist(),
    "nothing": lambda x: None,
}
OPTIONS: dict[str, list[dict[str, object]]] = {
    "gae": [{}, {"lam": torch.tensor(0.9)}, {"lam": torch.rand(4)}, {"gamma": 2.0}, {"lam": True},
            {"masked_steps": "x"}, {"bootstrap_value": torch.rand(4)}, {"impl": "cpu"}, {"impl": "tpu"}],
    "policy_loss": [{}, {"kl_coef": torch.tensor(0.5)}, {"kl_coef": 0.5, "kl_estimator": "k3"}, {"dual_clip": 1.0},
                    {"cliprange": (0.1, True)}, {"weights": torch.rand(4)}, {"row_weight": torch.rand(4, 1)},
                    {"row_weight": torch.rand(4)}, {"normalizer": 7}, {"normalizer": -1.0}],
    "value_loss": [{}, {"cliprange_value": None}, {"cliprange_value": -1.0}, {"row_weight": torch.rand(4)}],
    "token_logprobs": [{}, {"entropy": True}, {"entropy": "detached"}, {"temperature": 0.0}, {"temperature": True},
                       {"temperature": torch.rand(4) + 1}, {"ignore_index": 1.0}, {"ignore_index": 2},
                       {"ignore_index": 2**63}, {"temperature": float("inf")}, {"temperature": float("nan")}],
}  # fmt: skip


def inputs(op: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(4, 6, generator=g) < 0.7
    if op == "token_logprobs":
        logits = torch.randn(4, 6, generator=g)
        return {"logits": logits, "labels": torch.zeros(4, dtype=torch.int64), "mask": mask[:, 0]}
    takes = getattr(ppo_kernels, op).__annotations__
    return {name: torch.randn(4, 6, generator=g) for name in TOKENS if name in takes} | {"mask": mask}


def outcome(op: str, validate: bool, given: dict[str, object], options: dict[str, object]) -> object:
    """Values, dtypes and whether they require grad, of the gradient too; or the error."""
    given = {name: x.clone().requires_grad_() if _is_leaf(x) else x for name, x in given.items()}
    try:
        results = getattr(ppo_kernels, op)(**given, **options, validate=validate)
    except Exception as error:
        return type(error), str(error)
    flat = [x for part in (results if isinstance(results, tuple) else (results,)) for x in _flat(part)]
    leaves = [x for x in given.values() if _is_leaf(x)]
    if leaves and flat[0].requires_grad:
        flat += [g for g in torch.autograd.grad(flat[0].sum(), leaves, allow_unused=True) if g is not None]
    return [(x.dtype, x.requires_grad, tuple(x.shape), x.detach().double().nan_to_num(99.0).tolist()) for x in flat]


def test_every_op_with_a_short_way_is_here(monkeypatch):
    asked, shortcut = set(), backends.Op.shortcut
    monkeypatch.setattr(backends.Op, "shortcut", lambda op, *given: asked.add(op.name) or shortcut(op, *given))
    for name, case in cases.REGISTERED.items():
        case.run("cpu", **bare_inputs(case, cases.make(name).tensors), **case.bare_options)
    assert asked == set(OPTIONS)


def _is_leaf(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _flat(x: object) -> list:
    return list(x) if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("op", OPTIONS)
def test_the_short_way_gives_what_the_long_way_gives(op):
    """Results or errors, in every dtype, shape and form of every input, and for every option."""
    plain = inputs(op)
    calls = [(plain, options) for options in OPTIONS[op]]
    calls += [(plain | {name: change(x)}, {}) for name, x in plain.items() for change in ODD.values()]
    differentiated = next(iter(plain))
    for given, options in list(calls):
        if isinstance(given[differentiated], torch.Tensor) and given[differentiated].is_floating_point():
            calls.append((given | {differentiated: given[differentiated].detach().requires_grad_()}, options))
    refused = 0
    for given, options in calls:
        short, long = (outcome(op, validate, given, options) for validate in (False, True))
        assert short == long, (options, {name: getattr(x, "shape", x) for name, x in given.items()})
        refused += isinstance(short, tuple)
    assert 20 < refused < len(calls) - 20


def test_what_no_one_differentiates_is_not_recorded():
    x, y = inputs("value_loss")["values"], torch.zeros(4, 6, requires_grad=True)
    loss, stats = ppo_kernels.value_loss(x, y, y)
    assert not any(t.requires_grad for t in (loss, *stats))
    with torch.no_grad():
        assert not ppo_kernels.value_loss(y, x, x)[0].requires_grad
        assert not ppo_kernels.token_logprobs(y, torch.zeros(4, dtype=torch.int64)).requires_grad
    assert not any(t.requires_grad for t in ppo_kernels.gae(x, y))
