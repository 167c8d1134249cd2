"""The loops over logits on a CPU: those for AVX-512, which serve the other tests where it is, and the portable ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_kernels import _native, token_logprobs
from tests.lib.helpers import bit_equal, in_fresh_process
from tests.lib.memory import fenced

#: What reads logits: its values, and the rest of its tests, which `make verify PART=factorial` runs.
SAME_TESTS = [
    ["test_token_logprobs.py", "test_written_values.py"],
    pytest.param(["test_token_logprobs_api.py", "test_contracts_memory.py", "test_avx512.py"], marks=pytest.mark.rest),
]
# Short of, at and beyond a step of 64 logits, a run of 16 terms and a block of 4096.
VOCABULARIES = (15, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097, 8200)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.skipif(not _native.avx512_loops(), reason="this CPU has no AVX-512: the tests have run the portable loops")
@pytest.mark.parametrize("files", SAME_TESTS, ids=["values", "others"])
def test_the_portable_loops_pass_the_same_tests(files):
    folder = Path(__file__).parent
    run = (
        "import sys, pytest; from ppo_kernels import _native; assert not _native.avx512_loops(); "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", run, "-q", "-p", "no:cacheprovider", "-k", "cpu and not cuda"]
        + [str(folder / name) for name in files],
        cwd=folder.parent,
        env=os.environ | {"PPO_KERNELS_AVX512": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def results_of_both_passes(logits, labels, grads):
    """What the loops make of logits: the sums, and what has to be the same to the last bit."""
    ops = torch.ops.ppo_kernels
    logprobs, (row_max, log_sum, entropy) = ops.token_logprobs(logits, labels, None, None, 0.7, -100, True)
    # The backward of both is given the same row statistics, so that its loop alone can differ.
    exact = [x.float() for x in ops.token_logprobs(logits.double(), labels, None, None, 0.7, -100, True)]
    gradients = [
        ops.token_logprobs_backward(logits, labels, None, grads[0], grad_entropy, *exact, 0.7, -100)
        for grad_entropy in (None, grads[1])
    ]
    return [logprobs, entropy, log_sum], [row_max, *gradients]


@pytest.mark.skipif(not _native.avx512_loops(), reason="this CPU has no AVX-512")
@pytest.mark.parametrize("vocab", VOCABULARIES, ids=lambda vocab: f"cpu-{vocab}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_portable_loops_agree(dtype, vocab):
    g = torch.Generator().manual_seed(vocab)
    logits, labels = (torch.randn(8, vocab, generator=g) * 4).to(dtype), torch.randint(vocab, (8,), generator=g)
    grads = torch.randn(2, 8, generator=g)
    sums, exact = results_of_both_passes(logits, labels, grads)
    with _native.portable_loops():
        assert not _native.avx512_loops()
        portable_sums, portable_exact = results_of_both_passes(logits, labels, grads)
    assert _native.avx512_loops()
    assert bit_equal(tuple(exact), tuple(portable_exact))
    torch.testing.assert_close(sums, portable_sums, rtol=4e-7, atol=4e-7)


def whole_blocks_between_guard_pages(front):
    torch.set_num_threads(1)
    ops, grad_output = torch.ops.ppo_kernels, torch.ones(3)

    def results(logits, labels):
        out = ops.token_logprobs(logits, labels, None, None, 1.0, -100, True)
        gradients = [
            ops.token_logprobs_backward(logits, labels, None, grad_output, more, *out, 1.0, -100)
            for more in (None, grad_output)
        ]
        ops.token_logprobs_backward_(logits, labels, None, grad_output, None, *out, 1.0, -100)
        return (*out, *gradients, logits)

    for dtype in DTYPES:
        for vocab in VOCABULARIES:
            values, labels = torch.randn(3, vocab).to(dtype), torch.tensor([0, vocab // 2, vocab - 1])
            want, got = results(values.clone(), labels), results(fenced(values, front), labels)
            assert bit_equal(want, got), (dtype, vocab)
            assert bit_equal(want[2], want[4]), (dtype, vocab)


@pytest.mark.skipif(_native.CPU_ERROR is not None, reason="the C++ ops are not built")
@pytest.mark.parametrize("front", [True, False], ids=["cpu-front", "cpu-back"])
def test_whole_blocks_stay_within_guard_pages(front):
    in_fresh_process(whole_blocks_between_guard_pages, front)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1], ids=lambda bits: f"cpu-{bits:x}")
@pytest.mark.parametrize("which", [0, 1], ids=["logp", "entropy"])
def test_every_nan_gradient_of_the_output_stays_one(require_impl, bits, which):
    """Also those whose low bits would carry into the sign when they are rounded to bfloat16."""
    impl = require_impl("token_logprobs", "cpu")
    grad_output = torch.tensor([0, bits], dtype=torch.int32).view(torch.float32)
    logits = torch.randn(2, 500, dtype=torch.bfloat16, requires_grad=True)
    out = token_logprobs(logits, torch.tensor([1, 2]), entropy=True, impl=impl)
    (grad,) = torch.autograd.grad(out[which], logits, grad_output)
    assert grad[1].isnan().all()
    assert not grad[0].any()
