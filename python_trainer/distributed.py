"""Ranks: what they tell each other, and how they stop together. Of one process too."""

import contextlib
import functools
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


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

    by_hand = False  # ctrl-C, after which a shell is not to go on with its script


PATIENCE = 1.0  # seconds in which a second ctrl-C is the first: a launcher passes on what the terminal sends to all


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and the first ctrl-C ask and do not kill; the function, called on every rank, says whether any
    rank was asked.

    A process that a reward function forks ends by SIGTERM as it would without us. The first ctrl-C, which a terminal
    sends to it too, it survives: the step at hand needs it.
    """
    asked, by_hand, process = False, math.inf, os.getpid()

    def note(*_: object) -> None:
        nonlocal asked
        asked = True

    def note_by_hand(number: int, frame: FrameType | None) -> None:
        nonlocal asked, by_hand
        if time.monotonic() > by_hand + PATIENCE:
            signal.default_int_handler(number, frame)
        if not asked and os.getpid() == process and is_main():
            with contextlib.suppress(OSError):  # no stream: this may have come in the middle of a write
                os.write(2, b"\nctrl-C: it ends after the step at hand; once more, and it ends at once\n")
        asked, by_hand = True, min(by_hand, time.monotonic())

    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, note) if main_thread else None
    # Where ctrl-C is not Python's own any more (nohup, a notebook), it stays as it is.
    takes_ctrl_c = main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if main_thread:
        _ours.append(note)
    if takes_ctrl_c:
        signal.signal(signal.SIGINT, note_by_hand)
    try:
        yield lambda: bool(gather_rows(torch.tensor([int(asked)], device=device())).any())
    except Stopped as stopped:
        stopped.by_hand = by_hand < math.inf
        raise
    finally:
        if main_thread:
            _ours.remove(note)
            signal.signal(signal.SIGTERM, before)
        if takes_ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)


_ours: list[Callable] = []  # what SIGTERM calls
_forking = threading.local()


def _before_fork() -> None:
    """Python forgets in a new process what its own handlers were told until then: a pool would wait for it forever."""
    if _ours and signal.getsignal(signal.SIGTERM) is _ours[-1]:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork(in_child: bool) -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is None:
        return
    if in_child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=functools.partial(_after_fork, False),
    after_in_child=functools.partial(_after_fork, True),
)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def local_shard(parameter: Any) -> Any:
    """What this rank holds of a parameter: its part at ZeRO 3, elsewhere all of it."""
    return getattr(parameter, "ds_tensor", parameter)


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
def raise_on_all_ranks(kind: type[Exception]) -> Iterator[None]:
    """An error of this kind on one rank is one of every rank, and says so: none is left waiting for it."""
    failure = None
    try:
        yield
    except kind as error:
        failure = str(error)
    failures = [text for text in gather_objects(failure) if text is not None]
    if failures:
        shared: Any = kind(failures[0])
        shared.everywhere = True
        raise shared


@contextlib.contextmanager
def gathered_params(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, each of them is whole on every rank, whatever the ZeRO stage."""
    import deepspeed

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def weights_of(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of a model as it would be saved, adapters merged in.

    Each is whole until the next is asked for: who keeps one copies it.
    """
    for name, _ in module.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        place, _, leaf = plain.rpartition(".")
        layer = module.get_submodule(place)
        parts = layer.parameters() if hasattr(layer, "base_layer") else [getattr(layer, leaf)]
        with gathered_params(parts):
            yield plain, merged_weight(layer, leaf)


def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters, each of them added to the weight it adapts, in float32."""
    weights = {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = weights[f"{name}.weight"].float()  # half precision may hold nothing of what an adapter changes
            weights[f"{name}.weight"] = weight + layer.get_delta_weight("default").float()
    return weights


def merged_weight(layer: Any, name: str) -> torch.Tensor:
    """One parameter of a layer, its adapter added."""
    weight = getattr(getattr(layer, "base_layer", layer), name).detach()
    if name == "weight" and hasattr(layer, "get_delta_weight"):
        return weight + layer.get_delta_weight("default")
    return weight


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


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all of it is, in one pass over memory: NaN spreads to the extremes, and infinity is one."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(tensor.detach().aminmax()).isfinite().all()
