"""One process or many: the same start under plain python, torchrun and the deepspeed launcher."""

import contextlib
import hashlib
import io
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import transformers

from . import files
from .config import UserError

T = TypeVar("T")


def start(seed: int, timeout_s: int) -> None:
    """Join the process group, seed the generators and keep the libraries' chatter off the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="deepspeed|torch")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _find_build_tools()
    with quiet():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        # Without a launcher DeepSpeed would look for MPI. A store inside the process also needs no port.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not torch.cuda.is_available():
        _compile_cpu_communication()
    with quiet():
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s))


def stop() -> None:
    """Leave together: a rank that is still closing its connections when another has gone can abort at its exit."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def loss_of_a_rank(error: RuntimeError) -> str | None:
    """In words, where a collective operation failed because another rank did."""
    text = str(error)
    if world_size() == 1:
        return None
    if any(sign in text for sign in ("onnection closed by peer", "onnection reset by peer", "remote process exited")):
        return f"rank {rank()} stops, since another rank is gone: its own output says why"
    if "imed out" in text or "timeout" in text:
        return (
            f"rank {rank()} stops, since another rank did not answer within ddp_timeout: it hangs, or is slower than "
            f"that ({text.splitlines()[0]})"
        )
    return None


class Stopped(Exception):
    """The run was asked to end and has left a checkpoint; nothing failed."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM asks and does not kill; the function, called on every rank, says whether any rank was asked."""
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        asked = True

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if main_thread else None
    try:
        yield lambda: bool(gather_rows(torch.tensor([int(asked)], device=device())).any())
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def cache_folder() -> Path:
    """Where what is fetched or compiled once stays."""
    return Path(os.environ.get("PPO_KERNELS_CACHE", Path.home() / ".cache" / "ppo_kernels"))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def group() -> dist.ProcessGroup | None:
    """The group whose ranks share statistics; None where one process is all there is."""
    return dist.group.WORLD if world_size() > 1 else None


def seed_of(*numbers: int) -> int:
    """A seed for one purpose: nothing depends on what was drawn before, so a resumed run draws the same."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean(figure: float) -> float:
    """Over the ranks."""
    return gather_rows(torch.tensor([figure], dtype=torch.float64, device=device())).mean().item()


def gather_objects(mine: T) -> list[T]:
    """What each rank has, in rank order, on every rank: anything small that can be pickled."""
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A UserError of one rank is one of every rank: none is left waiting for it."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = str(error)
    failures = [text for text in gather_objects(failure) if text is not None]
    if failures:
        raise UserError(failures[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what a library prints, and show it only if the call fails."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held), contextlib.redirect_stderr(held):
            yield
    except BaseException:
        sys.stderr.write(held.getvalue())
        raise


def _find_build_tools() -> None:
    """DeepSpeed calls `ninja` by name; a virtual environment that is used but not activated hides it."""
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])


def _compile_cpu_communication() -> None:
    """Build the op that DeepSpeed would build at its start, one process at a time.

    torch guards such builds with a file that outlives a killed process, and then waits for it forever. In a folder of
    our own, under a lock that dies with its process, a guard that is found was left behind and can go.
    """
    from deepspeed.comm.torch import build_shm_op

    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    folder = cache_folder() / "torch_extensions" / environment
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)) != str(folder):
        return  # somebody else's to manage
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / ".building", wait=True):
        for guard in folder.glob("*/lock"):
            if files.is_folder(guard.parent):
                guard.unlink()
        if is_main() and not any(folder.glob("*/*.so")):
            print("DeepSpeed compiles its CPU communication op: about 30 seconds, once.", flush=True)
        with quiet():
            build_shm_op()
