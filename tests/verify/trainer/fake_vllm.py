"""As much of vLLM's interface as python_trainer uses, over a model of transformers."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROWS = 3  # requests that run at once


class SamplingParams(SimpleNamespace):
    pass


class LogitsProcessor:
    pass


class LogitsProcessorV2:
    pass


class BatchUpdate(NamedTuple):
    removed: list
    added: list
    moved: list


def process_dict_updates(entries: dict, update: BatchUpdate | None, new_state: Any) -> None:
    if update is None:
        return
    for row in update.removed:
        entries.pop(row)
    for row, params, prompt, tokens in update.added:
        entries[row] = new_state(params, prompt, tokens)
    for old, new in update.moved:
        entries[new] = entries.pop(old)


class LLM:
    context = 1000  # tokens that fit into its memory
    forgets = ""  # a weight that its model does not know
    keeps = False  # the weights it has, whatever it is given

    def __init__(self, folder: str, *, logits_processors: list, dtype: torch.dtype, **options: Any) -> None:
        assert not options["enable_prefix_caching"], "keys and values of old weights"
        self.options = options
        self.vllm_config = self.model_config = None
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
        self.model.lm_head.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None)
        self.model.load_weights = self._load
        (kind,) = logits_processors
        self.second_runner = issubclass(kind, LogitsProcessorV2)
        self.processor = kind(None, None) if self.second_runner else kind(None, torch.device("cpu"), False)

    def get_model(self) -> Any:
        return self.model

    def collective_rpc(self, function: Any, args: tuple) -> list:
        return [function(self, *args)]

    def _load(self, weights: Any) -> set[str]:
        mine, loaded = dict(self.model.named_parameters()), set()
        kept = [(name, weight) for name, weight in weights if name != self.forgets]  # held back, as layers are
        for name, weight in kept:
            if not self.keeps:
                mine[name].data.copy_(weight)
            loaded.add(name)
        return loaded

    def generate(self, prompts: list[dict], params: list[SamplingParams], use_tqdm: bool) -> list:
        assert not use_tqdm
        assert all(one.temperature == 0 and one.ignore_eos for one in params), "vLLM's own sampling and end tokens"
        waiting = [
            (number, prompt["prompt_token_ids"], one, [])
            for number, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
        running: dict[int, tuple] = {}
        removed: list[int] = []
        done = {}
        while waiting or running:
            added = []
            while waiting and len(running) < ROWS:
                row = next(row for row in range(ROWS) if row not in running)
                running[row] = waiting.pop(0)
                added.append(row)
            order, logits = self._logits(running, removed, added)
            removed = []
            for row, token in zip(order, logits.argmax(dim=-1).tolist(), strict=True):
                number, prompt, one, tokens = running[row]
                tokens.append(token)
                full = len(tokens) == one.max_tokens or len(prompt) + len(tokens) >= self.context
                if token in one.stop_token_ids or full:
                    done[number] = SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])
                    del running[row]
                    removed.append(row)
        if not self.second_runner:
            self.processor.update_state(BatchUpdate(removed, [], []))
        return [done[number] for number in range(len(prompts))]

    def _logits(self, running: dict[int, tuple], removed: list[int], added: list[int]) -> tuple[list, torch.Tensor]:
        """The first runner closes gaps between its rows; in the second a request has a slot, and rows any order."""
        if self.second_runner:
            for slot in added:
                self.processor.add_request(slot, running[slot][2])
            order = sorted(running, reverse=True)
            lengths = [len(running[slot][1]) + len(running[slot][3]) for slot in order]
            ctx = SimpleNamespace(idx_mapping_np=np.array(order), seq_lens_upper_bound_np=np.array(lengths))
            return order, self.processor.apply(self._raw([running[slot] for slot in order]), ctx)
        gone = [row for row in removed if row not in added]
        news = [(row, running[row][2], running[row][1], running[row][3]) for row in added]
        moved = []
        for hole in range(len(running)):
            if hole not in running:
                moved.append((max(running), hole))
                running[hole] = running.pop(max(running))
        self.processor.update_state(BatchUpdate(gone, news, moved) if gone or news or moved else None)
        order = list(range(len(running)))
        return order, self.processor.apply(self._raw([running[row] for row in order]))

    def _raw(self, rows: list[tuple]) -> torch.Tensor:
        return torch.stack([self.model(torch.tensor([prompt + tokens])).logits[0, -1] for _, prompt, _, tokens in rows])


def install(monkeypatch, runner: int) -> type[LLM]:
    """`import vllm` finds this."""
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.config": {"set_current_vllm_config": lambda _: contextlib.nullcontext()},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda model: None,
            "finalize_layerwise_reload": lambda model, config: None,
        },
        "vllm.triton_utils": {"HAS_TRITON": runner == 2},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {
            "LogitsProcessor": LogitsProcessor,
            "process_dict_updates": process_dict_updates,
        },
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu": {},
        "vllm.v1.worker.gpu.sample": {},
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": LogitsProcessorV2},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return LLM
