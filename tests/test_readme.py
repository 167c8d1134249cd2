"""What the README shows runs as pasted."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs_as_pasted(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"loss -?\d+\.\d+, ratio 1\.0000, clipped 0\.00, ran on \{'cpu': 1\}\n", run.stdout), run.stdout


def test_every_public_name_is_mentioned_or_reachable_from_one_that_is():
    import ppo_kernels

    text = README.read_text()
    results = {"PolicyStats": "policy_loss", "ValueStats": "value_loss", "P3OStats": "p3o_loss"}
    for name in ppo_kernels.__all__:
        assert results.get(name, name) in text, f"README.md does not mention {name}"
