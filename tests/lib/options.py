"""Options that are numbers: of every public function, found by the annotations of its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

import ppo_kernels as pk
from tests.lib import cases

#: Constants of a compiled graph, which shape the work.
CONSTANT = ("memory_mib",)
#: The variant of the contract in which an option is read.
VARIANT = {
    "sapo_temperature_pos": "surrogate",
    "sapo_temperature_neg": "surrogate",
    "entropy_coef": "entropy",
    "entropy_normalizer": "entropy",
    "reject_bounds": "rows",
}
#: Of these None is a default, and does not switch a bound off.
DEFAULTS = ("normalizer", "entropy_normalizer", "max_length", "group_advantages.eps")
#: Values in use, where 0.25 is none.
VALUES = dict.fromkeys(("dual_clip", "delta", "weight_clip", "bounds"), 1.25)
VALUES |= dict.fromkeys(("normalizer", "entropy_normalizer", "max_length"), 8.0) | {"gamma": 0.5, "reject_bounds": 0.5}


class Number(NamedTuple):
    function: str
    option: str
    value: float
    bound: bool  # which None and inf switch off
    call: Callable[..., object]

    def __call__(self, impl: str, value: object) -> tuple[torch.Tensor, ...]:
        """What the function returns where the option has this value, flat."""
        return cases.outputs(self.call(**{self.option: value, "impl": impl}))


def _aggregation_weights(impl: str, **options: object) -> object:
    return pk.aggregation_weights(torch.ones(2, 3, device="cpu"), "seq-mean-token-sum-norm", **options)


def _call(function: str, option: str) -> Callable[..., object]:
    """The contract's call, or one of a function that has no kernel and so no contract."""
    logits, labels = torch.linspace(-1, 2, 24).view(2, 3, 4).sin(), torch.arange(6).view(2, 3) % 4
    others = {
        "aggregation_weights": _aggregation_weights,
        "partial": partial(pk.partial, logits, labels),
        "merge": partial(pk.merge, pk.partial(logits, labels)[None], logits, labels),
    }
    if function in others:
        return others[function]
    name = f"{function}:{VARIANT[option]}" if option in VARIANT else function
    return partial(getattr(pk, function), **cases.make(name).tensors | dict(cases.REGISTERED[name].options))


def _numbers() -> dict[str, Number]:
    found = {}
    for function in pk.__all__:
        if inspect.isclass(getattr(pk, function)):
            continue
        for option, parameter in inspect.signature(getattr(pk, function)).parameters.items():
            kind, name = str(parameter.annotation), f"{function}.{option}"
            if not ("float" in kind or kind == "Bounds") or option in CONSTANT:
                continue
            bound = "Tensor" not in kind and ("None" in kind or kind == "Bounds") and not {option, name} & {*DEFAULTS}
            found[name] = Number(function, option, VALUES.get(option, 0.25), bound, _call(function, option))
    return found


NUMBERS = _numbers()
BOUNDS = {name: number for name, number in NUMBERS.items() if number.bound}
