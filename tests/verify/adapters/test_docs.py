"""What docs/adapters.md shows runs as pasted, where the trainer is."""

import re

import pytest

from ppo_kernels import integrations
from tests.lib.checkout import ROOT
from tests.verify.adapters.lib import load

EXAMPLES = [
    code
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adapters.md").read_text(), re.S)
    if "runpy" not in code  # starts a cluster of Ray: test_ray.py
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs_as_pasted(code):
    (trainer,) = set(re.findall(r'apply\("(\w+)"\)', code))
    if trainer == "deepspeed_chat":
        pytest.skip("it is a line of a script of DeepSpeed-Chat's")
    load(trainer)
    try:
        exec(compile(code, "docs/adapters.md", "exec"), {"__name__": "__main__"})
    finally:
        integrations.revert(trainer)
