"""In workers of a Ray cluster of this machine: the setup hook that docs/adapters.md names, and verl's plugin alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.lib.checkout import ROOT, environment
from tests.verify.adapters.lib import FOLDERS, load

SCRIPT = """
import ray

hook = {"worker_process_setup_hook": "ppo_kernels.integrations.from_environment"} if HOOK else {}
variables = {"PPO_KERNELS_PATCH": PATCH} if PATCH else {}
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, runtime_env={**hook, "env_vars": variables})


@ray.remote
def work():
    import torch
    import verl.utils.torch_functional as tensors

    tensors.logprobs_from_logits(torch.randn(3, 5), torch.zeros(3, dtype=torch.long))
    from ppo_kernels import integrations

    waiting = {row.state for row in integrations.adapter("openrlhf").report()}
    return integrations.status(), waiting


print(ray.get(work.remote(), timeout=120))
ray.shutdown()
"""


@pytest.mark.parametrize(
    ("hook", "patch", "verl", "openrlhf"), [(True, "openrlhf", 0, "waiting"), (False, "", 1, "left out")]
)
def test_adapters_are_in_place_in_a_worker(hook, patch, verl, openrlhf, tmp_path):
    load("verl", "verl", "ray")
    info = tmp_path / "declares-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declares\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nppo_kernels = ppo_kernels.integrations.verl_plugin\n")
    path = ":".join(map(str, (ROOT, tmp_path, *FOLDERS)))
    env = environment(PYTHONPATH=path, RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    code = f"HOOK, PATCH = {hook!r}, {patch!r}\n" + SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    served = {"verl": {"logprobs_from_logits": {"served": 1, "not covered": {}}}} if verl else {}
    assert done.stdout.strip().splitlines()[-1] == str((served, {openrlhf}))
