"""token_logprobs: the one op that reads the logits."""

from __future__ import annotations

import torch

from bench import oracle
from bench.cases import LOGITS_AXES, SMALL_CALL_TARGETS, Case, Data, DeviceTarget, Target, normal, with_holes
from ppo_kernels import merge, partial

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {"quick": (256, 151936), "small": (64, 32000), "full": (1024, 151936)}
SIZES_BACKWARD = SIZES | {"full": (256, 151936)}
# Every block size, with rows that begin at 16-byte boundaries and with rows that do not.
VOCABULARIES = (
    *((BF16, vocab) for vocab in (300, 5000, 32000, 50257, 151936)),
    *((FP16, 151935), (FP32, 32001), (FP32, 128256)),
)
SUPPORT = 64  # tokens that sampling left of the vocabulary
MANY = 8  # labels per row, where there are several: the top tokens of a teacher


def split(*rows: int) -> dict:
    """So few rows that blocks share each of them out. From four on they begin at no boundary."""
    on_host = ((BF16, (1, 2, 40001), {}),) if len(rows) > 1 else ()
    return {"gpu": tuple((BF16, (1, n, 151936 - n // 4), {}) for n in rows), "host": on_host}


GPU = [(8192, 128256), (8192, 151936), (8192, 151935)]


def eager(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)


def bare(logits, labels):
    return torch.ops.ppo_kernels.token_logprobs.default(logits, labels, None, None, 1.0, -100, False)[0]


def eager_of_many(logits, labels):
    """Distillation's: in the logits' dtype the gradients of a row would be summed in it."""
    return torch.log_softmax(logits.float(), -1).gather(-1, labels)


def eager_entropy(logits):
    return torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)


def eager_with_entropy(logits, labels):
    return eager(logits, labels), eager_entropy(logits)


def eager_with_extras(logits, labels):
    log_p = torch.log_softmax(logits.float(), -1)
    top = logits.gather(-1, labels[..., None])[..., 0] == logits.amax(-1)
    return log_p.gather(-1, labels[..., None])[..., 0], log_p.exp().square().sum(-1), top


def of_shards(logits, labels, impl="auto"):
    """Two of them, in one process."""
    half = logits.size(-1) // 2
    shards = {0: logits[:, :half], half: logits[:, half:]}
    parts = [partial(z, labels, vocab_start=first, impl=impl) for first, z in shards.items()]
    return merge(parts, shards[0], labels, impl=impl)


def eager_of_support(logits, labels, support):
    allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, support, True)
    return eager(torch.where(allowed, logits, -torch.inf), labels)


def inputs(g, dtype, rows, vocab):
    logits = normal(g, rows, vocab).to(dtype)
    return {"logits": logits, "labels": torch.randint(vocab, (rows,), generator=g, device=g.device)}


def inputs_of_support(g, dtype, rows, vocab):
    support = torch.randint(vocab, (rows, SUPPORT), generator=g, device=g.device)
    return inputs(g, dtype, rows, vocab) | {"support": support, "labels": support[:, 0].contiguous()}


def inputs_of_many(g, dtype, rows, vocab):
    more = {"labels": torch.randint(vocab, (rows, MANY), generator=g, device=g.device)}
    return inputs(g, dtype, rows, vocab) | more


def contract_inputs(g, dtype, batch, length, vocab=None):
    vocab = vocab or 40 + length
    logits = (normal(g, batch, length, vocab) * 3).to(dtype)
    labels = torch.randint(0, vocab, (batch, length), generator=g)
    return {"logits": logits, "labels": labels, "mask": with_holes(batch, length), "temperature": torch.tensor(0.8)}


def contract_inputs_of_many(g, dtype, batch, length, vocab=None):
    """A label that is masked alone, and one that a row has twice."""
    one = contract_inputs(g, dtype, batch, length, vocab)
    labels = torch.randint(0, one["logits"].size(-1), (batch, length, 4), generator=g)
    labels[..., 3] = labels[..., 1]
    labels[::2, :, 2] = -100
    return one | {"labels": labels}


def contract(variant, entropy=False, given=contract_inputs, vocabularies=VOCABULARIES, **more):
    return Case(
        op="token_logprobs",
        variant=variant,
        contract=True,
        vocabulary=True,
        inputs=given,
        options={"entropy": entropy},
        leaf="logits",
        reach=tuple((dtype, (2, 3, vocab), {}) for dtype, vocab in vocabularies),
        choices={"inplace_backward": (False, True)},
        **more,
    )


def work(dtype, *, entropy=False, backward=False, many=False, **more):
    """Eager code in bf16 rounds log p = -12 to within 3 %."""
    name = f"token_logprobs{f', {MANY} labels' if many else ''}{' + entropy' if entropy else ''}"
    low, pages = dtype == BF16, dtype.itemsize if backward else 0
    sizes = {size: [shape] for size, shape in (SIZES_BACKWARD if backward else SIZES).items()}
    return Case(
        op="token_logprobs",
        work=f"{name} fwd+bwd" if backward else name,
        dtype=dtype,
        inputs=inputs_of_many if many else inputs,
        options={"entropy": entropy},
        leaf="logits" if backward else None,
        eager=eager_of_many if many else eager_with_entropy if entropy else eager,
        bare=None if entropy or backward or many else bare,
        portable_loops=True,
        moved=lambda x: x["logits"].nbytes * (3 if backward else 1),
        device_target=DeviceTarget(share=0.85) if backward else DeviceTarget(share=0.9, odd=0.85),
        tolerance=5e-3 if backward and low else 2e-5,
        eager_tolerance=(1e-1 if entropy else 3e-2) if low else 1e-4,
        shapes=sizes | ({"gpu": GPU[:1] if backward else GPU, "tiny": [(8, 96), (8, 97)]} if low else {}),
        axes=LOGITS_AXES if low and not many else (),
        threads=(64, 32000) if low and not many else None,
        # The forward keeps a few numbers per row and never a temporary of the size of the logits.
        most_extra=lambda rows, vocab: pages * rows * vocab + (64 + 16 * MANY * many) * rows,
        **more,
    )


def beside(name, given=inputs, **more):
    """What few callers ask for, so that it has no row of its own in a quick run, nor compiled."""
    return Case(
        op="token_logprobs",
        work=f"token_logprobs{name}",
        dtype=BF16,
        inputs=given,
        tolerance=2e-5,
        eager_tolerance=3e-2,
        shapes={size: [SIZES[size]] for size in ("small", "full")},
        compiled=(),
        **more,
    )


def logits_of(kind, vocab, g):
    labels = torch.randint(0, vocab, (4,), generator=g)
    z = torch.randn(4, vocab, generator=g) * {"flat": 1e-3, "peaked": 4.0, "far apart": 2.0, "p near 1": 1.0}[kind]
    if kind == "peaked":
        z[torch.arange(4), labels] += torch.tensor([0.0, 8.0, 16.0, 24.0])
    if kind == "far apart":
        z += torch.tensor([-1e4, 1e4, -100.0, 0.0])[:, None]
    if kind == "p near 1":
        z[torch.arange(4), labels] = torch.tensor([20.0, 25.0, 30.0, 40.0])
    return z, labels


def accuracy(g):
    for dtype in (BF16, FP16, FP32):
        for kind in ("flat", "peaked", "far apart", "p near 1"):
            for vocab in (50257, 151936):
                z, labels = logits_of(kind, vocab, g)
                results = ("log p", "entropy", "gradient") if kind != "p near 1" else ("log p, p near 1",)
                yield Data({"logits": z.to(dtype), "labels": labels}, results)


def accurate_eager(logits, labels):
    """float32 whatever the logits are, each result by a function of its own."""
    log_p = torch.log_softmax(logits.float(), -1)
    again = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, labels[..., None])[..., 0], -(again.exp() * again).sum(-1)


def truth(logits, labels, **options):
    ones = torch.ones(labels.shape)
    return oracle.token_logprobs(logits, labels, grad_logp=ones, grad_entropy=ones)


MANY_REACH = (VOCABULARIES[0], *VOCABULARIES[5:7])  # in turns as above: the kernels of one label are the same
BACKWARD = (Target("eager", 6), Target("torch.compile", 4))
CASES = (
    contract("", meetings=split(*range(1, 9))),
    contract("detached", "detached"),
    contract("labels", True, contract_inputs_of_many, MANY_REACH, differentiable_outputs=2, meetings=split(3)),
    contract(
        "entropy",
        True,
        differentiable_outputs=2,
        meetings=split(1, 8),
        accuracy=accuracy,
        accurate_eager=accurate_eager,
        truth=truth,
    ),
    work(
        BF16,
        small_call=(8, 1000),
        small_call_targets=SMALL_CALL_TARGETS,
        targets=(
            *(Target("reference", 12), Target("eager", 4.5), Target("torch.compile", 2)),
            # What refutes a target is in bench/NOTES.md: time per logit of the arithmetic alone.
            Target("TRL", 5, reached=2.9, limit="0.13 ns per logit and core, the sums alone take 0.145"),
        ),
    ),
    work(
        FP32,
        compiled=("full",),
        small_call=(8, 1000),
        # It shares out the 8,000 logits, which take one core 0.7 µs (bench/NOTES.md).
        small_call_targets=(
            *SMALL_CALL_TARGETS,
            Target("F.cross_entropy", 1, reached=0.9, limit="on two threads: it computes with both"),
        ),
    ),
    work(
        BF16,
        entropy=True,
        compiled=("full", "gpu"),
        targets=(
            Target("eager", 15),
            Target("TRL", 15, reached=8.5, limit="0.15 ns per logit and core, the sums alone take 0.178"),
        ),
    ),
    work(BF16, backward=True, targets=BACKWARD),
    work(FP32, backward=True, targets=BACKWARD, compiled=("quick", "full", "gpu")),
    beside(
        " + extras",
        options={"extras": ("sum_sq_probs", "top1")},
        eager=eager_with_extras,
        moved=lambda x: x["logits"].nbytes,
        targets=(Target("eager", 3),),
    ),
    beside(
        " of a support",
        inputs_of_support,
        eager=eager_of_support,
        moved=lambda x: x["support"].nbytes + x["support"].numel() * x["logits"].element_size(),
        targets=(Target("eager", 3),),
    ),
    beside(
        " of two shards",
        function=of_shards,
        eager=eager,
        moved=lambda x: x["logits"].nbytes,
        targets=(Target("eager", 3),),
    ),
    work(BF16, many=True, compiled=("full", "gpu"), targets=(Target("eager", 3),)),
    work(BF16, many=True, backward=True, compiled=("full", "gpu"), targets=(Target("eager", 3),)),
)
