"""What the benchmarks do on a GPU alone, as far as a machine without one can tell: rings, graphs, clocks, targets."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import clocks, measure, report, results
from bench.cases import DeviceTarget, benchmark, benchmarks
from bench.rows import PHASES, PRODUCTS, PROVIDERS, Row, Setup, call_of, phase

pytestmark = pytest.mark.host


@pytest.fixture
def cuda(monkeypatch):
    """A device whose graphs record nothing and whose streams are names."""
    graph = SimpleNamespace(replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": lambda: graph, "Stream": lambda: stream, "current_stream": lambda: stream}
    fakes |= {"stream": contextlib.nullcontext, "synchronize": lambda: None}
    fakes |= {"graph": lambda graph, stream: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_a_graph_has_every_call_once_and_keeps_what_each_returned(cuda):
    made = []

    def call(i):
        made.append((i, torch.zeros(1)))
        return made[-1][1]

    replay, why = measure.captured([lambda i=i: call(i) for i in range(3)])
    assert why == ""
    of_the_capture = [x for _, x in made[-3:]]
    assert [i for i, _ in made[-3:]] == [0, 1, 2]
    assert all(kept is x for kept, x in zip(replay(), of_the_capture, strict=True))


def test_a_call_that_cannot_be_captured_says_why(cuda, monkeypatch):
    def waits():
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    assert measure.captured([waits]) == (None, "RuntimeError: operation not permitted when stream is capturing")


def test_outputs_of_a_round_are_kept_and_times_are_per_work():
    timed = measure.Timed([lambda i=i: [i] for i in range(3)], works=4, repeats=5)
    timed._enqueue()
    assert timed.kept == {0: [0], 1: [1], 2: [2]}
    timed.calls = [lambda: None]
    few = timed.sample() * timed.repeats * timed.works
    assert 0 < few < 1


def test_no_timed_gradient_sums_up_or_fills():
    """The incoming gradient is made once: on a GPU each of these would be a kernel among ours."""
    setup = Setup(benchmark("policy_loss fwd+bwd"), (4, 40))
    outputs = setup.case.run("torch", **setup.inputs)
    setup.finish(outputs)
    with torch.profiler.profile() as profile:
        setup.finish(setup.case.run("cpu", **setup.inputs))
    ran = {event.key for event in profile.key_averages()}
    assert any("policy_loss" in name for name in ran)
    assert not ran & {"aten::sum", "aten::ones_like", "aten::fill_"}


@pytest.mark.parametrize("provider", ["cpu", PRODUCTS])
def test_the_backward_that_is_timed_alone_is_that_of_every_leaf(cuda, monkeypatch, provider):
    """Of the hidden states and of the weight; matrix products alone have none."""
    setup = Setup(benchmark("linear_policy_loss fwd+bwd", torch.bfloat16), (3, 4, 16, 96))
    half = call_of(setup, provider)(setup.inputs)
    timed, grad = [], torch.autograd.grad

    def spy(outputs, inputs, *given, **more):
        timed.extend([len(inputs)] if "retain_graph" in more else [])
        return grad(outputs, inputs, *given, **more)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    facts = measure._parts(Row("g", setup, provider), 1, [half], [half], [setup])
    assert ("backward_seconds" in facts) == bool(timed) == (provider == "cpu")
    assert set(timed) <= {2}


def test_a_backward_that_runs_once_leaves_the_other_times(cuda):
    setup = Setup(benchmark("policy_loss fwd+bwd"), (4, 40))
    gone = [lambda: torch.zeros(())]  # nothing to differentiate
    facts = measure._parts(Row("g", setup, "torch.compile"), 1, gone, gone, [setup])
    assert facts["call_seconds"] > 0
    assert "does not require grad" in facts["no_halves"]


@pytest.mark.parametrize("work", ["policy_loss fwd+bwd", "value_loss fwd+bwd", "p3o_loss of 2 fwd+bwd"])
def test_a_loss_has_to_move_17_bytes_per_token(work):
    """Three inputs in float32 and a mask are read, and a gradient is written: once each."""
    assert Setup(benchmark(work), (4, 40)).moved == 17 * 160


def test_targets_of_a_device():
    aligned, odd = (8192, 151936), (8192, 151935)
    share = DeviceTarget(share=0.9, odd=0.8)
    assert share.most(aligned, 9e-6) == pytest.approx(1e-5)
    assert share.most(odd, 8e-6) == pytest.approx(1e-5)
    gae = benchmark("gae").device_target
    assert gae.verdict((512, 2048), 4e-6, 5.9e-6, 14e-6) == "met"
    assert gae.verdict((512, 2048), 4e-6, 6.1e-6, 14e-6) == "MISSED"
    assert gae.verdict((64, 32768), 8e-6, 10e-6, 16e-6) == "call MISSED"
    for case in benchmarks():
        if case.op in ("gae", "policy_loss", "value_loss", "token_logprobs") and "gpu" in case.shapes:
            if "importance_sampling_level" in case.options:
                continue  # a pass over the rows goes first
            assert case.device_target is not None, case.work


def test_every_provider_is_timed_in_one_phase():
    assert {phase(name) for name in PROVIDERS} == set(PHASES)
    assert phase("cuda") == phase("bare op") == "ours"
    assert phase("eager") == phase("TRL") == "others"


LOG = """2026/11/29 12:00:00.000, 1980, 0x0000000000000000
2026/11/29 12:00:00.500, 1200, 0x0000000000000004
2026/11/29 12:00:01.000, [N/A], 0x0000000000000000
2026/11/29 12:00:01.500, 1965, 0x0000000000000001
2026/11/29 12:00:0"""


def test_clocks_are_read_and_a_held_down_one_shows(tmp_path):
    (tmp_path / "clocks.csv").write_text(LOG)
    samples = clocks.read(tmp_path / "clocks.csv")
    assert [sample.mhz for sample in samples] == [1980, 1200, 1965]
    assert clocks.summary(samples) == (
        "SM clock: 1200 to 1980 MHz, median 1965, 3 samples; held down in 1 of them: power cap"
    )
    assert clocks.summary(samples[:1]).endswith("never held down")
    assert clocks.summary([]) == "SM clock: not logged"
    late = clocks.between(samples, samples[2].when, samples[2].when)
    assert late == samples[2:]


def row(provider: str, micros: float, begin: float, **more) -> dict:
    case = benchmark("gae")
    info = {"provider": provider, "op": "gae", "work": "gae", "bytes": 17 * 2**20, "GB/s": 3000.0, "by": "graph"}
    info |= {"call_seconds": 14e-6, "l2_warm_seconds": 3e-6, "between": [begin, begin + 1]} | more
    stats = {"min": micros * 0.9e-6, "median": micros * 1e-6, "iqr": micros * 0.1e-6, "rounds": 9}
    return {"group": case.group((512, 2048)), "extra_info": info, "stats": stats}


def test_no_shape_of_the_gpu_is_a_small_call():
    groups = [case.group(shape) for case in benchmarks() for shape in case.shapes.get("gpu", ())]
    assert not [group for group in groups if results.small_call(group)]
    assert results.small_call("token_logprobs bf16 [8, 1000]")


def test_the_device_table_has_floor_target_verdict_and_clock(tmp_path):
    (tmp_path / "clocks.csv").write_text(LOG)
    samples = clocks.read(tmp_path / "clocks.csv")
    rows = [row("cuda", 5.9, samples[0].when), row("triton", 7.0, samples[0].when), row("TRL", 50, 0.0, by="events")]
    data = {"benchmarks": rows, "run": {"GB/s": {"copy": 4000.0}}, "clocks": samples, "machine_info": {"gpu": "H"}}
    table = results.device_table(results.Results(data))
    lines = {line[1]: dict(zip(table.header, line, strict=True)) for line in table.lines}
    assert lines["cuda"]["target"] == "≤ 6 met"
    assert lines["triton"]["target"] == "≤ 6 MISSED"
    assert lines["TRL (events)"]["target"] == lines["TRL (events)"]["MHz"] == ""
    assert lines["cuda"]["MHz"] == "1200!"
    assert (lines["cuda"]["floor"], lines["cuda"]["min"], lines["cuda"]["IQR"]) == ("4.46", "5.31", "10%")
    data["run"]["size"] = "gpu"
    table, bad = report.targets(results.Results(data))
    assert bad == len(table.lines) - 1  # the others were not measured
    assert ["gae fp32 [512, 2048]", "≤ 6 µs", "5.9 µs", "met"] in table.lines
    data["benchmarks"] = [row("cuda", 5.9, 0.0, call_seconds=16e-6)]
    assert report.targets(results.Results(data))[1] == bad + 1
    assert "held down in 1" in "\n".join(report.facts(results.Results(data)))
