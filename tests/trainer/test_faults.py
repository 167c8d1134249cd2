"""The fast rows of `make faults`: all in one process of their own, whose forks share its imports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

MODULES = (Path(__file__).parent / "faults").glob("*.py")
FAST = [
    name
    for module in sorted(MODULES)
    for heading, name in re.findall(r"^@row\((.*?)\)\ndef (\w+)", module.read_text(), re.MULTILINE | re.DOTALL)
    if "slow=True" not in heading
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "outcomes.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.faults", "--fast", "--json", str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert path.exists(), done.stderr[-3000:]
    return json.loads(path.read_text())


def test_the_rows_are_those_that_ran(outcomes):
    assert sorted(outcomes) == sorted(FAST)


@pytest.mark.parametrize("name", FAST)
def test_fault(outcomes, name):
    assert outcomes[name]["passed"], outcomes[name]["text"]
