"""Two machines: network namespaces with a cable between them, each started by itself with one hostfile."""

import shutil
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lib.trainer import TINY, as_options, command

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts():
    """[(name, address, interface)] of two hosts that reach each other and nothing else."""
    mark = uuid.uuid4().hex[:6]
    names = [f"pk{mark}{end}" for end in "ab"]
    cables = [f"{name}w" for name in names]
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (iproute2)")
    allowed = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if allowed.returncode != 0:
        pytest.skip(f"no network namespaces here: {allowed.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        found = []
        for name, cable, address in zip(names, cables, ("10.77.0.1", "10.77.0.2"), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
            found.append((name, address, cable))
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_two_hosts_make_the_step_of_one(hosts, tiny, tmp_path):
    """`deepspeed --hostfile`, once on each host: the weights of one process."""
    tiny(algorithm="ppo", deepspeed="ds_zero2.json").train()
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for _, address, _ in hosts))
    options = as_options(TINY | {"deepspeed": "ds_zero2.json", "output_dir": tmp_path / "two"})

    def start(number: int):  # in a namespace of its own, where the port is free
        name, _, interface = hosts[number]
        launcher = ("ip", "netns", "exec", name, DEEPSPEED, "--hostfile", str(hostfile), "--no_ssh")
        launcher += ("--node_rank", str(number), "--master_addr", hosts[0][1], "--master_port", "29650", "--module")
        return command("train", *options, launcher=launcher, GLOO_SOCKET_IFNAME=interface)

    with ThreadPoolExecutor() as both:
        results = list(both.map(start, range(len(hosts))))
    assert [result.returncode for result in results] == [0, 0], "".join(result.stderr[-2000:] for result in results)
    one, two = (load_file(tmp_path / run / "train" / "model" / "model.safetensors") for run in ("run", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-6, rtol=0)
