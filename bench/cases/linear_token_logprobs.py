"""linear_token_logprobs: log-probabilities from hidden states and the head's weight, without logits [N, V]."""

from __future__ import annotations

import math

import torch

from bench import oracle
from bench.cases import Case, Data, Inputs, Target, normal, with_holes

BF16, FP32 = torch.bfloat16, torch.float32
#: [tokens, hidden, vocabulary]
SHAPES = {
    "quick": [(128, 1024, 16000)],
    "small": [(64, 256, 8000)],
    "full": [(256, 1024, 151936)],
    "gpu": [(8192, 4096, 128256)],
    "tiny": [(8, 16, 96)],
}
MIB = 2**20


#: A CPU's tiles are float32 whatever the inputs are, a GPU's operands in half precision.
LEFT_OUT = {BF16: ("quick",), FP32: ("gpu", "tiny")}


def sizes(shapes, dtype):
    return {size: shapes[size] for size in shapes if size not in LEFT_OUT[dtype]}


def inputs(g, dtype, tokens, width, vocab):
    weight = normal(g, vocab, width) / math.sqrt(width)
    labels = torch.randint(vocab, (tokens,), generator=g, device=g.device)
    return {"hidden": 2 * normal(g, tokens, width).to(dtype), "weight": weight.to(dtype), "labels": labels}


def contract_inputs(g, dtype, batch, length) -> Inputs:
    """A weight of few rows; the dimension of a shape that ops without a vocabulary have is that of the tokens."""
    vocab, width = 40, 6
    tensors = {"hidden": normal(g, batch, length, width), "weight": normal(g, vocab, width), "bias": normal(g, vocab)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    labels = torch.randint(0, vocab, (batch, length), generator=g)
    return tensors | {"labels": labels, "mask": with_holes(batch, length), "temperature": torch.tensor(0.8)}


def eager(hidden, weight, labels):
    return torch.log_softmax(hidden @ weight.t(), -1).gather(-1, labels[:, None]).squeeze(-1)


OPTIONS = {"softcap": 20.0, "logit_scale": 0.9}  # of the contract


def accurate_eager(hidden, weight, labels, bias=None):
    """All logits in float32."""
    z = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    cap = OPTIONS["softcap"]
    z = cap * torch.tanh(OPTIONS["logit_scale"] * z / cap)
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


class Products:
    """The products of the work on tensors of the dtype of the tiles, each into memory that is there."""

    def __init__(self, hidden, weight, gradients):
        wide = hidden.device.type == "cpu"
        x, w = (t.detach().flatten(0, -2) for t in (hidden, weight))
        self.x, self.w = (x.float(), w.float()) if wide else (x, w)
        self.gradients, dtype = gradients, self.x.dtype
        self.logits = torch.empty(len(x), len(w), dtype=dtype, device=x.device)
        if gradients:
            self.logits.normal_(std=1e-3)
            self.of_x, self.of_w = torch.empty_like(self.x), torch.empty_like(self.w)

    def forward(self):
        torch.mm(self.x, self.w.t(), out=self.logits)

    def backward(self):
        torch.mm(self.logits, self.w, out=self.of_x)
        torch.mm(self.logits.t(), self.x, out=self.of_w)


def products(forwards):
    """So many products for logits, and where there is more than one or a gradient, those of the gradients."""

    def prepare(hidden, weight, **_others):
        of = Products(hidden, weight, forwards != 1 or weight.requires_grad)

        def call():
            for _ in range(forwards):
                of.forward()
            if of.gradients:
                of.backward()

        return call

    return prepare


def moved(x):
    """Once; what it takes is arithmetic."""
    return x["hidden"].nbytes + x["weight"].nbytes


def accuracy(g):
    for dtype in (BF16, FP32):
        for scale in (1.0, 16.0):
            x = {"hidden": normal(g, 4, 64) * scale, "weight": normal(g, 20000, 64) / 8}
            labels = torch.randint(20000, (4,), generator=g)
            named = {name: t.to(dtype) for name, t in x.items()} | {"labels": labels}
            yield Data(named, ("log p", "entropy", "gradient"))


def truth(hidden, weight, labels, **_options):
    ones = torch.ones(labels.shape)
    return oracle.linear_token_logprobs(hidden, weight, labels, grad_logp=ones, grad_entropy=ones, **OPTIONS)


#: Figures are in bench/NOTES.md. What is left of a target where both sides do nothing but multiply matrices:
PRODUCTS, NARROW = (
    "the products alone are two thirds of its time and more",
    "its products are in bfloat16, and round the logits",
)
ONE, FOUR = "it too takes the time of one product", "it keeps the logits: three products against four"
OTHERS = {
    (FP32, False): (
        Target("TRL", 3, reached=0.85, limit=PRODUCTS),
        Target("F.linear_cross_entropy", 1.1, reached=0.75, limit=ONE),
    ),
    (FP32, True): (
        Target("TRL", 3, reached=1.0, limit=PRODUCTS),
        Target("F.linear_cross_entropy", 1.1, reached=0.65, limit=FOUR),
    ),
    (BF16, False): (Target("TRL", 3, reached=0.35, limit=NARROW),),
    (BF16, True): (Target("TRL", 3, reached=0.65, limit=NARROW),),
}


def work(dtype, *, backward=False, **more):
    low = dtype == BF16
    ratio = 1 / 1.15 if backward else 1 / 1.1
    most = 64 * MIB

    def most_extra(tokens, width, vocab):
        return most + (tokens * width * 4 + vocab * width * dtype.itemsize + tokens * width * dtype.itemsize) * backward

    return Case(
        op="linear_token_logprobs",
        work="linear_token_logprobs fwd+bwd" if backward else "linear_token_logprobs",
        dtype=dtype,
        inputs=inputs,
        leaf="hidden" if backward else None,
        also=("weight",) if backward else (),
        eager=eager,
        products=products(2 if backward else 1),
        moved=moved,
        shapes=sizes(SHAPES, dtype),
        compiled=("small",),
        tolerance=5e-3 if backward and low else 2e-5,
        eager_tolerance=3e-2 if low else 1e-4,
        targets=(Target("matrix products", ratio), *OTHERS[dtype, backward]),
        most_extra=most_extra,
        **more,
    )


CASES = (
    Case(
        op="linear_token_logprobs",
        contract=True,
        inputs=contract_inputs,
        options=OPTIONS | {"entropy": True},
        leaf="hidden",
        differentiable_outputs=2,
        rowwise=False,
        matrix_products=True,
        choices={"entropy": (True, False)},
        accuracy=accuracy,
        accurate_eager=accurate_eager,
        truth=truth,
    ),
    work(BF16),
    work(FP32),
    work(BF16, backward=True),
    work(FP32, backward=True),
)
