"""vLLM as the generator: one engine per rank, in the trainer's process. Imported only where it is asked for."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from . import distributed
from .config import UserError
from .data import Generate, Policy, only_drawn
from .distributed import weights_of

# vLLM has two model runners with one interface each for logits processors; without Triton there is the first alone.
RUNNER = os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", str(int(HAS_TRITON)))


DRAWN: list[tuple[list[tuple[int, int]], torch.Tensor]] = []  # (row, token) and log-probabilities of each step

SHORT_OF_MEMORY = "vLLM's memory does not hold a whole prompt and response: raise vllm_gpu_memory_utilization"


class VllmGenerator:
    """Responses are HfGenerator's, up to what rounding does to a token whose uniform number lies on the edge.

    Of vLLM's own sampling nothing is used, and no prefix is cached: its keys and values would be those of old weights.
    """

    def __init__(self, memory_share: float) -> None:
        self.memory_share = memory_share
        self.engine: LLM | None = None
        self.serves = ""  # which architecture and precision

    @contextlib.contextmanager
    def serving(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Generate]:
        pad, ends = tokenizer.pad_token_id, policy.end_ids
        engine = self._engine(policy.module)
        (missing,) = engine.collective_rpc(_load, args=(policy.module,))
        if missing:
            raise UserError(f"generation_engine vllm: this model has no {', '.join(missing)}; set generation_engine hf")

        def generate(
            ids: torch.Tensor, attention: torch.Tensor, uniforms: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            prompts = [row[mask].tolist() for row, mask in zip(ids, attention, strict=True)]
            drawing = {"temperature": policy.temperature, "vocabulary": policy.vocabulary}
            settings = [
                SamplingParams(
                    temperature=0.0,  # the logits processor leaves one token: there is nothing left to draw
                    max_tokens=len(row),
                    ignore_eos=True,  # those of the model's settings; all that end a response are below
                    stop_token_ids=ends,
                    detokenize=False,
                    extra_args=drawing | {"row": number, "uniforms": row, "prompt_length": len(prompt)},
                )
                for number, (row, prompt) in enumerate(zip(uniforms.tolist(), prompts, strict=True))
            ]
            responses, logprobs = torch.full(uniforms.shape, pad), torch.zeros(uniforms.shape)
            DRAWN.clear()
            with distributed.raise_on_all_ranks(UserError):
                try:
                    outputs = engine.generate([{"prompt_token_ids": row} for row in prompts], settings, use_tqdm=False)
                except ValueError as error:  # a prompt longer than what its memory holds
                    raise UserError(f"{SHORT_OF_MEMORY} ({error})") from error
                for response, output in zip(responses, outputs, strict=True):
                    tokens = output.outputs[0].token_ids
                    if len(tokens) < len(response) and not set(ends) & set(tokens):
                        raise UserError(SHORT_OF_MEMORY)
                    response[: len(tokens)] = torch.tensor(tokens)
            for places, found in DRAWN:
                logprobs[tuple(torch.tensor(places).T)] = found.cpu()
            return responses.to(ids.device), logprobs.to(ids.device)

        yield generate

    def _engine(self, module: Any) -> LLM:
        config = copy.deepcopy(module.config)
        config.architectures, config.dtype = [type(module).__name__], module.dtype
        wanted = config.to_json_string()
        if self.engine is None:
            self.engine, self.serves = self._started(config, module.dtype), wanted
        if self.serves != wanted:  # an engine that ends takes the process group with it
            raise UserError(
                "generation_engine vllm serves models of one architecture per run; set generation_engine hf"
            )
        return self.engine

    def _started(self, config: Any, dtype: torch.dtype) -> LLM:
        """Every rank starts an engine of its own; the process group is the trainer's."""
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)  # weights are never written
            threads = torch.get_num_threads()  # vLLM sets it to one, for the rest of the process
            try:
                return LLM(
                    folder,
                    skip_tokenizer_init=True,
                    trust_remote_code=False,
                    dtype=dtype,
                    load_format="dummy",
                    max_model_len=-1,  # the longest that memory allows
                    gpu_memory_utilization=self.memory_share,
                    distributed_executor_backend="external_launcher",
                    enforce_eager=distributed.device().type == "cpu",
                    enable_prefix_caching=False,
                    async_scheduling=False,
                    logits_processors=[DrawnInFirstRunner if RUNNER == "0" else DrawnInSecondRunner],
                )
            except ValueError as error:
                raise UserError(f"generation_engine vllm (see vllm_gpu_memory_utilization too): {error}") from error
            finally:
                torch.set_num_threads(threads)


class DrawnInFirstRunner(LogitsProcessor):
    """data.only_drawn, with what came with each request."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, tuple[dict[str, Any], list[int]]] = {}  # row of the batch -> what came, tokens so far

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.requests, batch_update, lambda params, _, tokens: (params.extra_args, tokens))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = [self.requests[row] for row in range(len(logits))]
        return _drawn(logits, [(given, len(tokens)) for given, tokens in rows])


class DrawnInSecondRunner(LogitsProcessorV2):
    """The same."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.requests: dict[int, dict[str, Any] | None] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self.requests[req_idx] = sampling_params.extra_args
        return sampling_params.extra_args is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        lengths = ctx.seq_lens_upper_bound_np.tolist()  # with the prompt; less than it while that is read in parts
        rows = [(self.requests[slot], n) for slot, n in zip(ctx.idx_mapping_np.tolist(), lengths, strict=True)]
        known = [(given, max(n - given["prompt_length"], 0)) for given, n in rows if given is not None]
        return _drawn(logits, known) if len(known) == len(rows) else logits  # vLLM warms up with requests of its own


def _drawn(logits: torch.Tensor, rows: list[tuple[dict[str, Any], int]]) -> torch.Tensor:
    """Each row with what came with its request, and how many tokens it has so far."""
    numbers = [(given["uniforms"][step], given["temperature"]) for given, step in rows]
    uniforms, temperatures = torch.tensor(numbers, dtype=torch.float64, device=logits.device).split(1, dim=1)
    tokens = rows[0][0]["vocabulary"]  # all are requests of one policy
    drawn, logprobs = only_drawn(logits, uniforms, temperatures.float(), tokens)
    DRAWN.append(([(given["row"], step) for given, step in rows], logprobs))
    return drawn


def _load(worker: Any, module: Any) -> list[str]:
    """The weights of now into vLLM's model, in place; returns the names of those it did not get."""
    model = worker.get_model()
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        # A layer takes its weights once it has them all; each is whole only until the next.
        loaded = model.load_weights((name, weight.clone()) for name, weight in weights_of(module))
        finalize_layerwise_reload(model, worker.model_config)
        head = getattr(model, "lm_head", None)
        if head is not None:  # on a CPU it has a packed copy, which does not follow weights tied to the embedding
            head.quant_method.process_weights_after_loading(head)
    names = {name for name, _ in model.named_parameters()}
    return sorted(names - (names if loaded is None else loaded))  # a few models do not say
