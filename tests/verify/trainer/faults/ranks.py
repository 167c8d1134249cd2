"""Two ranks, of which one dies, raises or stands still."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from python_trainer import deepspeed_engine, distributed
from tests.lib.trainer import ROOT, as_options, metric_rows

from .processes import Ranks, refused, run, succeeded
from .resuming import at_each_step, soon, train
from .rows import SETTINGS, row

LONG = {"total_steps": 1000, "save_steps": 0}
ENOUGH = 60  # seconds


def under_way(output: Path) -> bool:
    return (output / "train" / "metrics.jsonl").exists() and len(metric_rows(output)) > 2


def of_torchrun(folder: Path, output: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
            *("-m", "python_trainer", "train"),
            *as_options(SETTINGS | LONG | {"output_dir": output, "score_scaling": "none"}),
        ],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=(folder / "output").open("w"),
        stderr=subprocess.STDOUT,
    )


def workers(of: int) -> dict[int, int]:
    """Process id of each rank among the children."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (place / "environ").read_bytes().split(b"\0") if parent == of else []
        except (OSError, IndexError):
            continue
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(place.name)
    return found


@row("kill -9 of one of two ranks under torchrun", "all gone within 60 s, exit not 0, the signal named", slow=True)
def rank_killed(folder: Path) -> str:
    output = folder / "run"
    launcher = of_torchrun(folder, output)
    try:
        soon(lambda: under_way(output))
        processes = workers(launcher.pid)
        assert sorted(processes) == [0, 1]
        started = time.monotonic()
        os.kill(processes[1], signal.SIGKILL)
        code = launcher.wait(ENOUGH)
        seconds = time.monotonic() - started
    finally:
        launcher.kill()
    text = (folder / "output").read_text()
    assert code != 0
    assert "SIGKILL" in text, text[-2000:]
    assert "another rank is gone" in text, text[-3000:]
    soon(lambda: not any(Path(f"/proc/{process}").exists() for process in processes.values()), ENOUGH)
    return f"gone after {seconds:.0f} s"


def one_fails(folder: Path, function: Callable[[], None], **settings: int) -> Ranks:
    """Two ranks, started without a launcher, of which the second comes to `function` in each step."""

    def on_rank_one() -> None:
        at_each_step(lambda: function() if distributed.rank() == 1 else None)

    return Ranks(folder / "outputs", train(folder / "run", on_rank_one, **settings), 2)


@row("kill -9 of one of two ranks, no launcher", "the other ends within 60 s and says that a rank is gone", slow=True)
def rank_killed_alone(folder: Path) -> str:
    first, second = one_fails(folder, lambda: os.kill(os.getpid(), signal.SIGKILL)).wait()
    assert second.code == -signal.SIGKILL
    refused(first, "another rank is gone")
    assert first.seconds - second.seconds < ENOUGH
    return f"ended {first.seconds - second.seconds:.1f} s later"


def fail() -> None:
    raise RuntimeError("no score today")


@row("one of two ranks raises, no launcher", "the same; the cause is in that rank's output", slow=True)
def rank_raises(folder: Path) -> str:
    first, second = one_fails(folder, fail).wait()
    refused(second, "no score today")
    refused(first, "another rank is gone")
    return f"ended {first.seconds - second.seconds:.1f} s later"


@row("one of two ranks stands still (SIGSTOP), ddp_timeout 10", "the other ends and names ddp_timeout", slow=True)
def rank_stopped(folder: Path) -> str:
    ranks = one_fails(folder, lambda: os.kill(os.getpid(), signal.SIGSTOP), ddp_timeout=10)
    (first,) = ranks.wait(only=[0])
    ranks.kill([1])
    refused(first, "did not answer within ddp_timeout")
    return f"ended {first.seconds:.0f} s after the start"


@row("resumed by another number of ranks and at another ZeRO stage", "the same weights, to 1e-6", slow=True)
def another_layout(folder: Path) -> str:
    apart = []
    succeeded(run(folder / "outputs", train(folder / "straight")))
    wanted = load_file(folder / "straight" / "train" / "model" / "model.safetensors")
    ways = ((1, 0, 2, 0), (2, 0, 1, 1), (1, 1, 2, 2), (2, 2, 1, 0), (1, 2, 2, 3), (2, 3, 1, 3), (1, 3, 2, 1))
    for way in ways:
        before, stage, after, stage_after = way
        output = folder / "-".join(map(str, way))
        succeeded(run(folder / "outputs", train(output, deepspeed=f"ds_zero{stage}.json"), before))
        for name in ("model", "checkpoints/step-000002", "checkpoints/step-000003"):
            shutil.rmtree(output / "train" / name)
        again = train(output, resume_from_checkpoint="latest", deepspeed=f"ds_zero{stage_after}.json")
        succeeded(run(folder / "outputs", again, after))
        found = load_file(output / "train" / "model" / "model.safetensors")
        apart.append(max((found[name] - wanted[name]).abs().max().item() for name in wanted))
    assert max(apart) <= 1e-6, apart
    return f"{len(ways)} ways, off by at most {max(apart):.1e}"


@row("kill -9 while DeepSpeed compiles its op, whose lock stays", "the next start compiles and runs", slow=True)
def killed_while_compiling(folder: Path) -> str:
    os.environ["PPO_KERNELS_CACHE"] = str(folder / "cache")

    def start() -> int:
        deepspeed_engine.init_distributed(0, 60)
        return distributed.world_size()

    try:
        first = Ranks(folder / "outputs", start)
        soon(lambda: any((folder / "cache").rglob("*.ninja")))
        first.kill([0])
        locks = list((folder / "cache").rglob("lock"))
        assert locks, "the build has left no lock: this row shows nothing"
        again = run(folder / "outputs", start, limit=400)
        assert succeeded(again) == 1
    finally:
        del os.environ["PPO_KERNELS_CACHE"]
    return f"started after {again[0].seconds:.0f} s, compiling included"
