"""The state of models and optimizers, in files that any number of ranks and any ZeRO stage can read.

Every tensor has a name and is thought of as flat. A rank holds slices: without ZeRO all of each, otherwise the part
that DeepSpeed gave it. It writes the slices that it holds (of what all hold, its share) and, continuing a run, reads
what overlaps with those it holds then. Nothing is gathered, and at most LARGEST elements are copied at a time.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import distributed
from .config import UserError
from .distributed import local_shard

LARGEST = 1 << 26
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Slice:
    """What a rank holds of a tensor: its elements from `start` on."""

    name: str
    start: int
    values: torch.Tensor  # [n], a view of where they are used
    everywhere: bool  # all ranks hold the same


@dataclass(frozen=True)
class Master:
    """Where a rank has its part of a trained parameter, in the precision that is trained."""

    holder: torch.Tensor  # one of the torch optimizer's parameters; its moments have the same layout
    offset: int  # of the part in the holder
    start: int  # of the part in the parameter
    numel: int
    everywhere: bool


def shards_to_write(slices: Iterable[Slice]) -> list[Slice]:
    """What this rank writes."""
    slices = list(slices)
    common = [part for part in slices if part.everywhere]
    return [part for part in slices if not part.everywhere] + common[distributed.rank() :: distributed.world_size()]


def write(folder: Path, owner: str, slices: Iterable[Slice]) -> None:
    for number, batch in enumerate(_batches(shards_to_write(slices))):
        (folder / f"{owner}-rank{distributed.rank()}-{number:04d}.safetensors").write_bytes(save(batch))


def read(folder: Path, names: Iterable[str], owner: str, slices: Iterable[Slice]) -> None:
    """Fill every slice, whoever wrote it, from those files of the folder; called on every rank."""
    wanted = {part.name: part for part in slices}
    of_owner = re.compile(rf"{owner}-rank[0-9-]+\.safetensors")
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in wanted}
    with distributed.raise_on_all_ranks(UserError):
        for path in [folder / name for name in sorted(names) if of_owner.fullmatch(name)]:
            try:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118  # no mapping
                        start, _, name = key.partition(":")
                        if name in wanted:
                            found[name].append(_copy(file.get_slice(key), int(start), wanted[name]))
            except (SafetensorError, ValueError, IndexError, RuntimeError) as error:
                raise UserError(f"{path} is not what a checkpoint holds: {error}") from error
        for name, part in wanted.items():
            if not _tile(found[name], part.start, part.start + part.values.numel()):
                raise UserError(f"{folder} does not hold all of {name} of {owner}, each element once")


def laid_out(name: str, parameter: Any, held: torch.Tensor) -> Slice:
    """`held` has the layout of what this rank holds of a parameter: all of it, or at ZeRO 3 a part of equal parts."""
    flat = held.detach().view(-1)
    if not hasattr(parameter, "ds_id"):
        return Slice(name, 0, flat, everywhere=True)
    start = min(flat.numel() * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    return Slice(name, start, flat[: parameter.ds_numel - start], everywhere=False)  # the last parts may be padded


def slices(model: Any) -> list[Slice]:
    """Weights, buffers and the optimizer's moments, once it has any."""
    module, states = model.module, model.engine.basic_optimizer.state
    found = []
    for name, master in _masters(model):
        tensors = {"weight": master.holder} | {key: states.get(master.holder, {}).get(key) for key in MOMENTS}
        for kind, tensor in tensors.items():
            if tensor is not None:
                part = tensor.detach().view(-1)[master.offset : master.offset + master.numel]
                found.append(Slice(f"{kind}/{name}", master.start, part, master.everywhere))
    frozen = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad]
    found += [laid_out(f"weight/{name}", parameter, local_shard(parameter)) for name, parameter in frozen]
    saved = module.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in saved]
    return found + [Slice(f"buffer/{name}", 0, buffer.view(-1), everywhere=True) for name, buffer in buffers]


def refuse_unknown_layout(name: str, model: Any) -> None:
    """What is split in a way not known here could be neither saved nor restored."""
    engine = model.engine
    parameters = list(model.module.parameters())
    offloads = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    elsewhere = (
        "nvme" in [None if offload is None else offload.device for offload in offloads]
        or engine.super_offload()  # moments in another process
        or "zenflow" in type(engine.optimizer).__module__
        or any(hasattr(local_shard(parameter), "ds_quant_scale") for parameter in parameters)
    )
    weights = [] if elsewhere else [part for part in shards_to_write(slices(model)) if part.name.startswith("weight/")]
    found = sum(distributed.gather_objects(sum(part.values.numel() for part in weights)))
    if found != sum(_shape(parameter).numel() for parameter in parameters):
        raise UserError(
            f"deepspeed: this configuration keeps the {name}'s weights where checkpoints do not find them (offload to "
            "nvme, SuperOffload, ZenFlow, MiCS, quantized weights); use ZeRO 0 to 3, with offload to cpu if need be"
        )


def describe(model: Any) -> dict[str, Any]:
    """What else a continued run needs, the same on every rank and at every ZeRO stage; called on every rank."""
    engine, scaler = model.engine, _loss_scaler(model.engine)
    states = engine.basic_optimizer.state
    updates = {name: int(states.get(master.holder, {}).get("step", 0)) for name, master in _masters(model)}
    return {
        "shapes": _shapes(model),
        "updates": {name: count for part in distributed.gather_objects(updates) for name, count in part.items()},
        "schedule": engine.lr_scheduler.state_dict(),
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "loss_scale": {name: getattr(scaler, name) for name in LOSS_SCALE if getattr(scaler, name, None) is not None},
        "skipped": model.skipped,
    }


def restore(model: Any, folder: Path, names: Sequence[str], owner: str, saved: dict[str, Any]) -> None:
    """Bring a model to a state that `slices` were written of, and `describe` gave; called on every rank."""
    engine, scaler = model.engine, _loss_scaler(model.engine)
    refuse_unknown_layout(owner, model)
    _refuse_another_model(model, folder, owner, saved["shapes"])
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()  # no copies of parameters that are partitioned
    _count_updates(model, folder, saved["updates"])
    read(folder, names, owner, slices(model))
    _weights_from_masters(engine)
    _continue_schedule(engine, saved["schedule"]["last_epoch"])
    for name in COUNTERS:
        setattr(engine, name, saved["counters"][name])
    for name in LOSS_SCALE:
        if saved["loss_scale"].get(name) is not None and hasattr(scaler, name):  # None: never so far
            setattr(scaler, name, saved["loss_scale"][name])
    model.skipped = saved["skipped"]


def _continue_schedule(engine: Any, updates: int) -> None:
    """The rate after so many updates is that of this run's schedule, which may be longer than the one saved."""
    schedule = engine.lr_scheduler
    rates = [base * factor(updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    now = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | now)
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _batches(slices: Iterable[Slice]) -> Iterator[dict[str, torch.Tensor]]:
    batch: dict[str, torch.Tensor] = {}
    room = LARGEST
    for part in slices:
        for offset in range(0, part.values.numel(), LARGEST):
            values = part.values[offset : offset + LARGEST]
            if values.numel() > room:
                yield batch
                batch, room = {}, LARGEST
            batch[f"{part.start + offset}:{part.name}"] = values
            room -= values.numel()
    if batch:
        yield batch


def _copy(stored: Any, start: int, wanted: Slice) -> tuple[int, int]:
    """The overlap of what is stored from `start` on and what is wanted; says from where to where that is."""
    first = max(start, wanted.start)
    last = min(start + stored.get_shape()[0], wanted.start + wanted.values.numel())
    if first >= last:
        return first, first
    values = stored[first - start : last - start]
    if values.dtype != wanted.values.dtype:
        raise ValueError(f"{wanted.name} is {values.dtype} there and {wanted.values.dtype} in this run")
    wanted.values[first - wanted.start : last - wanted.start].copy_(values)
    return first, last


def _tile(parts: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether the parts, put in order, go from start to end without gap or overlap."""
    for first, last in sorted(part for part in parts if part[0] < part[1]):
        if first != start:
            return False
        start = last
    return start == end


def _masters(model: Any) -> Iterator[tuple[str, Master]]:
    """Of each trained parameter of which this rank has a part. The four layouts of DeepSpeed are known here alone."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = model.engine.optimizer
    whole: dict[Any, torch.Tensor] = {}
    if isinstance(optimizer, torch.optim.Optimizer):
        whole = {parameter: parameter for group in optimizer.param_groups for parameter in group["params"]}
    elif isinstance(optimizer, FP16_UnfusedOptimizer):  # ZeRO 0 in half precision
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            whole |= zip(low, high, strict=True)
    for name, parameter in model.module.named_parameters():
        if parameter in whole:
            yield name, Master(whole[parameter], 0, 0, parameter.numel(), everywhere=True)
        elif hasattr(parameter, "ds_id") and parameter.requires_grad:  # ZeRO 3
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            part = laid_out(name, parameter, local_shard(parameter))
            holder = optimizer.fp32_partitioned_groups_flat[group]
            yield name, Master(holder, offset, part.start, part.values.numel(), everywhere=False)
        elif getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO 1 and 2
            mapping = parameter._hp_mapping
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            (holder,) = optimizer.param_groups[mapping.param_group_index]["params"]
            yield name, Master(holder, here.start, there.start, there.numel, everywhere=False)


def _weights_from_masters(engine: Any) -> None:
    """As DeepSpeed does at the end of an update."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "checkpoint_event_epilogue"):  # ZeRO 3
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "fp32_groups"):  # ZeRO 0 in half precision
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, high, strict=True):
                weight.data.copy_(master.data)


def _count_updates(model: Any, folder: Path, updates: dict[str, int]) -> None:
    """Adam's count of updates, and moments to read into where it is above 0."""
    states = model.engine.basic_optimizer.state
    counts: dict[torch.Tensor, set[int]] = {}
    for name, master in _masters(model):
        counts.setdefault(master.holder, set()).add(updates.get(name, 0))
    if any(distributed.gather_objects(any(len(different) > 1 for different in counts.values()))):
        raise UserError(
            f"in {folder} some weights were updated more often than others, and this ZeRO stage has one count for "
            "many: continue at the stage that wrote it, or at stage 0"
        )
    for holder, (count,) in counts.items():
        if count == 0:
            states.pop(holder, None)
            continue
        state = states[holder]
        state["step"] = torch.tensor(float(count))
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(holder)


def _refuse_another_model(model: Any, folder: Path, owner: str, before: dict[str, list[int]]) -> None:
    now = _shapes(model)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{folder} is of another {owner}: {name} was {before.get(name, 'not there')} and is "
                f"{now.get(name, 'not there')}; resume with the models that the run began with"
            )


def _shapes(model: Any) -> dict[str, list[int]]:
    return {name: list(_shape(parameter)) for name, parameter in model.module.named_parameters()}


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _loss_scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
