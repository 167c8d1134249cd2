"""linear_policy_loss: loss and gradient from hidden states in three products, beside these products alone."""

from __future__ import annotations

import torch

from bench.cases import CLIP, Case, Data, Target, normal, right_padded, uniform, with_holes
from bench.cases.linear_token_logprobs import BF16, FP32, MIB, NARROW, PRODUCTS, Products, moved, sizes
from bench.cases.linear_token_logprobs import eager as eager_logprobs
from bench.cases.linear_token_logprobs import inputs as head_inputs
from bench.cases.policy_loss import eager as eager_loss

#: [sequences, tokens, hidden, vocabulary]
SHAPES = {
    "quick": [(4, 32, 1024, 16000)],
    "small": [(4, 16, 256, 8000)],
    "full": [(4, 64, 1024, 151936)],
    "gpu": [(8, 1024, 4096, 128256)],
    "tiny": [(2, 4, 16, 96)],
}

FRESH = "its results are fresh memory, and those of the products are not"


def inputs(g, dtype, batch, columns, width, vocab):
    """Log-ratios are within 0.1 or of size 0.5: rounding clips none of them."""
    x = head_inputs(g, dtype, batch * columns, width, vocab)
    with torch.no_grad():
        logprobs = eager_logprobs(x["hidden"].float(), x["weight"].float(), x["labels"]).view(batch, columns)
    small, sign = 0.2 * uniform(g, batch, columns) - 0.1, normal(g, batch, columns).sign()
    apart = torch.where(uniform(g, batch, columns) < 0.2, 0.5 * sign, small)
    x |= {"hidden": x["hidden"].view(batch, columns, width), "labels": x["labels"].view(batch, columns)}
    x |= {"old_logprobs": logprobs + apart, "advantages": normal(g, batch)}
    return x | {"mask": right_padded(g, batch, columns)}


def contract_inputs(g, dtype, batch, length):
    vocab, width = 40, 6
    floats = {"hidden": normal(g, batch, length, width), "weight": normal(g, vocab, width), "bias": normal(g, vocab)}
    names = ("old_logprobs", "advantages", "weights", "ref_logprobs")
    floats |= {name: uniform(g, batch, length) * (-4 if "logprobs" in name else 1) for name in names}
    floats |= {"row_weight": uniform(g, batch)}
    tensors = {name: x.to(dtype) for name, x in floats.items()}
    tensors |= {"labels": torch.randint(0, vocab, (batch, length), generator=g), "mask": with_holes(batch, length)}
    return tensors | {"normalizer": torch.tensor(17.0)}


def eager(hidden, weight, labels, old_logprobs, advantages, mask):
    logprobs = eager_logprobs(hidden.flatten(0, 1), weight, labels.flatten()).view(labels.shape)
    return eager_loss(logprobs, old_logprobs, advantages[:, None], mask)[0]


def accurate_eager(hidden, weight, labels, old_logprobs, advantages, mask):
    return eager(hidden.float(), weight.float(), labels, old_logprobs, advantages, mask)


def products(hidden, weight, mask, **_others):
    """Three, of the rows that count."""
    of = Products(hidden[mask], weight, True)

    def call():
        of.forward()
        of.backward()

    return call


def accuracy(g):
    for dtype in (BF16, FP32):
        yield Data(inputs(g, dtype, 2, 4, 64, 20000), ("loss", "gradient"))


def work(dtype, **more):
    low = dtype == BF16

    def most_extra(batch, columns, width, vocab):
        """The gradients in float32 and as they are returned, and the tiles before the latter are there."""
        both = batch * columns * width + vocab * width
        return 4 * both + max(256 * MIB, both * dtype.itemsize * low) + 4 * batch * columns * width

    return Case(
        op="linear_policy_loss",
        work="linear_policy_loss fwd+bwd",
        dtype=dtype,
        inputs=inputs,
        options={"cliprange": CLIP},
        leaf="hidden",
        also=("weight",),
        eager=eager,
        products=products,
        moved=moved,
        shapes=sizes(SHAPES, dtype),
        compiled=("small",),
        tolerance=5e-3 if low else 2e-5,
        eager_tolerance=1e-1 if low else 1e-4,
        targets=(
            Target("matrix products", 1 / 1.15, reached=1 / 1.35, limit=FRESH),
            Target("TRL", 3, reached=0.8, limit=NARROW) if low else Target("TRL", 3, reached=1.2, limit=PRODUCTS),
        ),
        most_extra=most_extra,
        **more,
    )


CASES = (
    Case(
        op="linear_policy_loss",
        contract=True,
        inputs=contract_inputs,
        options={"cliprange": (0.2, 0.3), "dual_clip": 3.0, "kl_coef": 0.1, "kl_estimator": "k3", "softcap": 20.0},
        leaf="hidden",
        rowwise=False,
        matrix_products=True,
        per_row=("advantages", "weights"),
        choices={"kl_estimator": ("k1", "abs", "k2", "k3")},
        bare_options={"kl_coef": 0.0},
    ),
    work(BF16),
    work(FP32, accuracy=accuracy, accurate_eager=accurate_eager),
)
