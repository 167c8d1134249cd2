"""DeepSpeed: its start, models that are trained, models that are frozen.

The layouts of its optimizers are in zero_state.py; distributed.py makes whole what it has split over the ranks.
"""

import contextlib
import ctypes
import hashlib
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers import get_scheduler
from transformers.activations import ACT2FN, GELUTanh

from . import distributed, files, zero_state
from .cache import cache_folder, make_cache_folder
from .config import OptimizerConfig, RunConfig, UserError
from .deepspeed_file import deepspeed_file

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt


def init_distributed(seed: int, timeout_s: int) -> None:
    """Join the process group, seed the generators and keep the libraries' chatter off the terminal."""
    # Both are the tanh approximation that GELUTanh has in one operation: transformers writes them out in eight.
    ACT2FN.update(gelu_new=GELUTanh, gelu_fast=GELUTanh)
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
        _keep_freed_memory()
    _find_build_tools()
    with distributed.quiet():
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
    with distributed.quiet():
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s))


class Trainable:
    """A DeepSpeed engine whose gradients add up plainly until `step`, which is never a non-finite one."""

    def __init__(self, model: torch.nn.Module, config: OptimizerConfig, learning_rate: float, updates: int) -> None:
        model.eval()  # dropout, router jitter and the like would make the ratio of two policies noise
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.healthy = torch.ones((), dtype=torch.bool, device=distributed.device())
        for parameter in weights:
            parameter.register_hook(self._watch)
        optimizer = torch.optim.AdamW(
            weights,
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        optimizer.register_step_pre_hook(self._drop_non_finite)
        self._norm: torch.Tensor | None = None
        self._dropped, self._vetoed = False, True  # DeepSpeed in half precision starts with an update by zero gradients
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, updates)
        with distributed.quiet():
            self.engine = _initialized(
                config.deepspeed,
                model=model,
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=deepspeed_config(config),
            )
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):  # there it keeps no norm
            self.engine.clip_fp32_gradients = self._clip
        self.skipped = 0
        self.gradient_norm = 0.0  # before clipping, of the last step
        self._fp16 = config.fp16

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    @property
    def module(self) -> Any:
        return self.engine.module

    @property
    def learning_rate(self) -> float:
        return self.engine.get_lr()[0]

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self._loss_scale(), scale_wrt_gas=False)

    def step(self, allowed: bool = True) -> None:
        """`allowed` False: the gradients go, the weights and the optimizer's moments stay."""
        self._dropped, self._vetoed, self._norm = False, not allowed, None
        scale = self._loss_scale()
        self.engine.step()
        self.healthy.fill_(True)
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            self.gradient_norm = float(self._norm or 0.0)
        else:  # None if it is switched off
            norm = self.engine.get_global_grad_norm()
            self.gradient_norm = float("nan") if norm is None else float(norm) / scale
        if self._dropped or not self.engine.was_step_applied():
            self.skipped += 1
        elif self._fp16:
            self.skipped = 0  # overflows are how a dynamic loss scale finds its size; many in a row are not

    def _loss_scale(self) -> float:
        """In half precision at ZeRO 0 DeepSpeed divides the gradients by its scale, and multiplies no loss by it."""
        from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

        optimizer = self.engine.optimizer
        return float(optimizer.loss_scale_config.cur_scale) if isinstance(optimizer, FP16_UnfusedOptimizer) else 1.0

    def _watch(self, gradient: torch.Tensor) -> None:
        self.healthy &= distributed.is_finite(gradient)

    def _clip(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.engine.gradient_clipping())

    def _drop_non_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed checks gradients in some modes only; here, after reduction, one rule holds for all."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.ones((), device=distributed.device())
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            self._norm = norm if self._norm is None else self._norm
            finite = (norm.isfinite() & self._norm.isfinite()).to(finite)
        if distributed.world_size() > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        if self._vetoed or not finite or not self._norm_of_deepspeed_is_finite():
            self._dropped = True
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW leaves a parameter without gradient, and its moments, alone

    def _norm_of_deepspeed_is_finite(self) -> bool:
        """Before clipping, where an optimizer of DeepSpeed computes it, the same on all ranks.

        It clips by a norm that is not finite too, and nothing is left of the gradients then.
        """
        norm = getattr(getattr(self, "engine", None) and self.engine.optimizer, "_global_grad_norm", None)
        return norm is None or 0 <= float(norm) < math.inf

    @torch.no_grad()
    def refuse_non_finite_weights(self, name: str) -> None:
        """No gradient need be at fault: an update can also divide by 0, or leave the range of a half precision."""
        if not all_finite(weights_here(self.module)):
            raise UserError(
                f"weights of the {name} are not finite after the last update, and nothing of it is saved: lower "
                "learning_rate, raise adam_epsilon, or start from the checkpoint before"
            )


def weights_here(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What this rank holds of each weight, without the padding of the last part, which DeepSpeed never fills."""
    for name, weight in module.named_parameters():
        yield zero_state.laid_out(name, weight, distributed.local_shard(weight)).values


def fingerprint(module: torch.nn.Module) -> str:
    """Of all weights, the same on any number of ranks and at any ZeRO stage: the sum of their bits as whole numbers."""
    sums = {True: 0, False: 0}  # of what all ranks hold, of what each holds a part of
    for name, weight in module.named_parameters():
        part = zero_state.laid_out(name, weight, distributed.local_shard(weight))
        bits = part.values.view(torch.int32 if part.values.element_size() == 4 else torch.int16)
        sums[part.everywhere] += int(bits.sum(dtype=torch.int64))
    return str(sums[True] + sum(distributed.gather_objects(sums[False])))


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """On every rank, asking the device once."""
    finite = torch.ones((), device=distributed.device())
    for tensor in tensors:
        finite *= distributed.is_finite(tensor).to(finite)
    if distributed.world_size() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def checkpoint_activations(model: Any) -> None:
    """transformers does so in training mode, which only the layers that do it are in, and nothing inside them."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # the name of older transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
            for name, value in vars(layer).items():
                if isinstance(value, float) and "drop" in name:  # a rate that the layer itself applies
                    setattr(layer, name, 0.0)


def step_together(models: Sequence[Trainable]) -> None:
    """A step of every model, or, if a gradient of any of them on any rank was not finite, of none."""
    healthy = torch.stack([model.healthy for model in models]).all().float()
    if distributed.world_size() > 1:
        dist.all_reduce(healthy, dist.ReduceOp.MIN)
    for model in models:
        model.step(allowed=bool(healthy))


def deepspeed_config(config: OptimizerConfig) -> dict[str, Any]:
    """The shipped or the user's file, plus what the loop's arithmetic depends on."""
    file = deepspeed_file(config)
    return (
        {"steps_per_print": None}
        | file
        | {
            "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.max_grad_norm,
            "bf16": file["bf16"] | {"enabled": config.bf16},
            "fp16": {"initial_scale_power": 12, "hysteresis": 1} | file["fp16"] | {"enabled": config.fp16},
        }
    )


def _initialized(file: str, **arguments: Any) -> Any:
    """An engine; DeepSpeed says what it does not like of a file in errors of many kinds."""
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        return deepspeed.initialize(**arguments)[0]
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError, ZeRORuntimeException) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"deepspeed: DeepSpeed does not take {file}: {reason}") from error


def frozen(model: torch.nn.Module, config: RunConfig) -> Any:
    """A model without gradients; partitioned over the ranks if the trained ones are (ZeRO 3), else plain."""
    model.eval().requires_grad_(False)
    settings = deepspeed_file(config)
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", 0) < 3:
        for parameter in model.parameters():  # no buffers, as in trained ones: rotary frequencies would be others
            parameter.data = parameter.data.to(dtype)
        return model.to(distributed.device())
    settings |= {
        "zero_optimization": {name: value for name, value in zero.items() if name != "offload_optimizer"},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.bf16},
        "fp16": {"enabled": config.fp16},
        "steps_per_print": None,
    }
    with distributed.quiet():
        return _initialized(config.deepspeed, model=model, config=settings)


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the system at once, and each page of one that is taken anew is a fault.

    Those of logits and their gradient are a tenth of a step on the CPU; what a step has freed, the next one takes.
    """
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


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
    inner = Path("torch_extensions") / environment
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None and given != str(cache_folder() / inner):
        return  # somebody else's to manage
    folder = make_cache_folder(str(inner))
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with files.locked(folder / ".building", wait=True):
        for guard in folder.glob("*/lock"):
            if files.is_folder(guard.parent):
                guard.unlink()
        if distributed.is_main() and not any(folder.glob("*/*.so")):
            print("DeepSpeed compiles its CPU communication op: about 30 seconds, once.", flush=True)
        with distributed.quiet():
            build_shm_op()
