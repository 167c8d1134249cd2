"""What the benchmarks and the parity tests call a trainer's own is that, also in a process where our ops are in place.

An installed plugin of verl's, or PPO_KERNELS_PATCH, puts them there without a word from whoever compares.
"""

from __future__ import annotations

import pytest

from bench import peers, rows
from ppo_kernels import integrations
from tests.verify import parity, test_parity
from tests.verify.adapters import lib, speed

NAMES = {"verl": "verl", "openrlhf": "OpenRLHF", "skyrl": "SkyRL", "trl": "TRL"}
parametrize = pytest.mark.parametrize("trainer", NAMES)


@pytest.fixture
def adapter(trainer):
    """The trainer's, in place in its loaded modules before anything to compare with is taken from the package."""
    one = integrations.adapter(trainer)
    lib.load(trainer, *dict.fromkeys(target.module for target in one.targets))
    assert {row.state for row in one.apply()} == {"replaced"}
    one.reset_status()
    for cached in (peers._loaded, *(value for value in vars(parity).values() if hasattr(value, "cache_clear"))):
        cached.cache_clear()
    yield one
    one.revert()
    one.reset_status()


@parametrize
def test_peers_of_the_benchmarks(trainer, adapter):
    called = set()
    for row in rows.works("small"):
        if row.provider == NAMES[trainer] and row.setup.case.work not in called:
            called.add(row.setup.case.work)
            peers.call(row.provider, row.setup.case.work, row.setup.inputs)()
            row.setup.release()
    assert called == set(peers.PEERS[NAMES[trainer]].works)
    assert adapter.status() == {}


@parametrize
def test_losses_and_corrections_of_the_parity_tests(trainer, adapter):
    compared = [one for one in (*test_parity.ROWS, *test_parity.CORRECTIONS) if one.trainer == NAMES[trainer]]
    assert compared
    for one in compared:
        one.theirs(test_parity.batch_of(interior=True))
    assert adapter.status() == {}


def test_the_column_of_their_own_speed(monkeypatch):
    """And a call that reaches ours in its turns is an error, not a ratio of 1."""
    (core,) = lib.load("verl", "verl.trainer.ppo.core_algos")
    adapter = integrations.adapter("verl")
    adapter.apply()
    x, mask = lib.draw(2, 3), lib.make_mask("whole")[:2, :3]
    ours = core.compute_value_loss  # somebody holds it
    monkeypatch.setattr(speed, "ROUNDS", 1)
    adapter.reset_status()
    seconds = speed.measure(adapter, lambda: core.compute_value_loss(x, x, x, mask, 0.2))
    assert min(seconds) > 0.0
    assert adapter.status() == {"compute_value_loss": {"served": 2, "not covered": {}}}
    monkeypatch.setattr(adapter, "revert", lambda: None)
    with pytest.raises(AssertionError, match="reached ours"):
        speed.measure(adapter, lambda: ours(x, x, x, mask, 0.2))
    monkeypatch.undo()
    adapter.revert()
    adapter.reset_status()
