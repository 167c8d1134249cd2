"""Models of transformers and adapters of peft: loaded as they were asked for, and saved as they came.

transformers answers a weight that is missing, of another shape or without a place with a warning, and goes on with
random weights; peft does so too. Here all of that ends the command.
"""

import contextlib
import copy
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from . import files
from .atomic import MANIFEST, refuse_unlisted
from .config import OptimizerConfig, RunConfig, UserError
from .distributed import is_finite

READ_BY_TRANSFORMERS = re.compile(
    r".*\.(json|safetensors|bin|jinja|model)|(vocab|merges)\.txt|additional_chat_templates"
)
GENERATION_CONFIG = "generation_config.json"
UNSEEN = 1e-3  # of the largest logit: what a token may change where it is not to be seen, and padding anywhere
NOT_CONTINUED = (  # of LoRA: what changes more than the plain pairs of matrices that a run trains
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("layer_replication", "ensure_weight_tying", "alora_invocation_tokens"),
)


@dataclass
class Origin:
    """What training changes of a loaded model, and saving gives back; attached to the model as `origin`."""

    dtype: torch.dtype
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the weights that have another
    generation_config: GenerationConfig | None = None
    base: str | None = None  # what adapters of this model stand on; None: nothing that can be loaded again


def load_model(kind: Any, path: str | Path, config: RunConfig, *, continue_rank: int | None = None) -> PreTrainedModel:
    """A model in float32 with its `origin`. An adapter is merged into its base, or left inside it (`continue_rank`)."""
    adapter = _adapter_at(path)
    if adapter is None:
        return _whole(kind, path, config)
    base = adapter.base_model_name_or_path
    if not base:
        raise UserError(
            f"the adapter {path} does not name its base (base_model_name_or_path): name it there, or merge it first"
        )
    if adapter.is_prompt_learning:
        raise UserError(f"the adapter {path} is of type {adapter.peft_type.value}, which is no change of weights")
    scores = adapter.task_type == "SEQ_CLS"
    try:
        if _adapter_at(base) is not None:
            raise UserError(f"{base} is an adapter too: merge that one first")
        model = _whole(kind, undamaged(Path(base)), config, headless=scores, **({"num_labels": 1} if scores else {}))
    except UserError as error:
        raise UserError(f"the adapter {path} needs its base (base_model_name_or_path): {error}") from error
    with_adapter = _injected(model, adapter, path)
    if continue_rank is not None:
        _refuse_to_continue(adapter, path, continue_rank)
        return model
    if not hasattr(with_adapter, "merge_and_unload"):
        raise UserError(f"the adapter {path} is of type {adapter.peft_type.value}, which cannot be merged: give a LoRA")
    model.origin.base = None  # what is on disk is another model from now on
    return with_adapter.merge_and_unload().requires_grad_(True)


def undamaged(path: Path) -> Path:
    """The same path, once its files are those of the manifest that our commands write beside a model."""
    if os.path.isfile(path / MANIFEST):
        refuse_unlisted(path, lambda name: READ_BY_TRANSFORMERS.fullmatch(name) is not None)
    return path


def load_tokenizer_files(path: str | Path) -> PreTrainedTokenizerBase:
    """Those of an adapter may lie beside its base."""
    try:
        return _tokenizer(path)
    except UserError:
        adapter = _adapter_at(path)
        if adapter is None or not adapter.base_model_name_or_path:
            raise
        return _tokenizer(adapter.base_model_name_or_path)


def _tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    with _readable(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # of some architectures it makes up an empty one
        raise UserError(f"{path} has no tokenizer: save the one there that its model was trained with")
    return tokenizer


def add_adapters(body: PreTrainedModel, config: OptimizerConfig, rank: int) -> None:
    """New LoRA adapters inside a model, at the modules of `lora_target_modules`."""
    peft = _peft()
    targets: Any = config.lora_target_modules or ",".join(_usual_targets(body))
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
        known = {part for name, _ in body.named_modules() for part in (name, name.rpartition(".")[2])}
        lost = [name for name in targets if not any(one == name or one.endswith(f".{name}") for one in known)]
        if lost:
            raise UserError(f"lora_target_modules: {type(body).__name__} has no module named {', '.join(lost)}")
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM" if body.can_generate() else "SEQ_CLS",
    )
    try:
        with _silent():
            peft.inject_adapter_in_model(settings, body)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {error}") from error
    _untie(body)


def has_adapters(body: Any) -> bool:
    return any(hasattr(module, "base_layer") for module in body.modules())


def save_whole(body: Any, merged: dict[str, torch.Tensor], folder: Path) -> None:
    """The model in the form of its source: precision, generation settings and dropout as they were.

    `merged`: its weights with the adapters in them.
    """
    origin: Origin = body.origin
    shell = _shell(body)
    cast: dict[Any, torch.Tensor] = {}  # one tensor for those that share their memory, as tied weights do

    def as_it_was(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point():
            return weight
        dtype = origin.dtypes.get(name, origin.dtype)
        if not is_finite(saved := weight.to(dtype)):
            raise UserError(f"{name} has grown beyond {dtype}, as which it is saved: set torch_dtype to bfloat16")
        return cast.setdefault((weight.data_ptr(), weight.shape, weight.stride()), saved)

    weights = {name: as_it_was(name, weight) for name, weight in merged.items()}
    shell.save_pretrained(folder, state_dict=weights)
    if shell.can_generate():
        (origin.generation_config or body.generation_config).to_json_file(folder / GENERATION_CONFIG)


def save_adapter(body: Any, score: torch.Tensor | None, folder: Path) -> None:
    """The adapters alone, as peft reads them; with the trained head of a model that scores."""
    from peft.utils import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    settings = copy.copy(body.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode = body.origin.base, True
    weights = get_peft_model_state_dict(body, save_embedding_layers=False)
    if score is not None:
        settings.modules_to_save, weights["score.weight"] = ["score"], score
    save_file(
        {f"base_model.model.{name}": weight.detach().contiguous() for name, weight in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    settings.save_pretrained(str(folder))


def _whole(kind: Any, path: str | Path, config: RunConfig, *, headless: bool = False, **more: Any) -> PreTrainedModel:
    """`headless`: the head of a model that scores may be missing, and that of one that speaks be left over."""
    if config.attn_implementation is not None:
        more["attn_implementation"] = config.attn_implementation
    with _readable(path):
        _refuse_foreign_kernels(path, PretrainedConfig.get_config_dict(str(path))[0])
        model, report = kind.from_pretrained(
            str(path),
            trust_remote_code=False,
            dtype=(config.torch_dtype if kind is AutoModelForCausalLM else None) or "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **more,
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"{path} is quantized, and quantized weights are not trained: give the model it was made from")
    _refuse_other_weights(model, report, path, ("score.", "lm_head.") if headless else ())
    model.origin = Origin(model.dtype, {}, None, str(path))
    state = model.state_dict()
    model.origin.dtypes = {name: tensor.dtype for name, tensor in state.items() if tensor.dtype != model.dtype}
    if model.can_generate():
        model.origin.generation_config = _generation_config(model, path)
    return model.float()


def _refuse_foreign_kernels(path: str | Path, settings: Any) -> None:
    """Of `owner/name` transformers fetches the compiled code from the Hub, and runs it."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        _refuse_foreign_kernels(path, value)
        names = list(value.values()) if isinstance(value, dict) else [value]
        code = [name for name in names if isinstance(name, str) and "/" in name]
        if key.endswith("_implementation") and code:
            raise UserError(
                f"{path}: its config.json has {key} {code[0][:60]!r}, which is code from elsewhere: take it out there"
            )


def _refuse_other_weights(model: Any, report: dict[str, Any], path: object, optional: tuple[str, ...]) -> None:
    missing, foreign = (
        sorted(name for name in report[kind] if not name.startswith(optional or ("\0",)))
        for kind in ("missing_keys", "unexpected_keys")
    )
    mismatched = sorted(report["mismatched_keys"])
    if not (missing or foreign or mismatched):
        return
    found = []
    if missing:
        found.append(f"{_first_of(missing)} missing")
    if foreign:
        found.append(f"{_first_of(foreign)} not part of it")
    if mismatched:
        name, there, here = mismatched[0]
        found.append(f"{name} of shape {tuple(there)}, not {tuple(here)}")
    prefix = next((one.removesuffix(name) for one in foreign for name in missing if one.endswith(f".{name}")), None)
    what = f"take the prefix {prefix!r} off their names" if prefix else "give the folder that such a model was saved in"
    raise UserError(f"{path} does not hold the weights of a {type(model).__name__} ({'; '.join(found)}): {what}")


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _generation_config(model: Any, path: str | Path) -> GenerationConfig:
    """transformers goes on without a file that it cannot read."""
    file = Path(path) / GENERATION_CONFIG
    if file.is_file():
        with _readable(file):
            json.loads(file.read_text())
    found = model.generation_config
    size = model.get_input_embeddings().num_embeddings
    wrong = [token for token in end_tokens(found) if not (isinstance(token, int) and 0 <= token < size)]
    if wrong:
        raise UserError(f"{path}: {GENERATION_CONFIG} ends at {wrong[0]!r}, and the model has tokens 0 to {size - 1}")
    return found


@torch.no_grad()
def refuse_unfit(model: PreTrainedModel, source: object) -> None:
    """A policy reads from left to right, and does not see the padding on its left."""
    if "flash" in (model.config._attn_implementation or ""):
        return  # it runs on the device alone; the check of each rollout sees as much
    size = len(model.get_input_embeddings().weight)
    ids = torch.arange(2, 6) % size
    other = torch.cat([ids[:-1], (ids[-1:] + 1) % size])
    left = ids[1:3]  # no pad token, whose embedding may happen to be 0
    padded = torch.stack([torch.cat([left, row]) for row in (ids, other)])
    mask = (torch.arange(6) >= 2).long().expand(2, 6)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    model.eval()
    with _readable(source):  # settings that loading does not look at may end its first pass
        both = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        bare = model(input_ids=ids[None], use_cache=False).logits[0]
    one, changed = both[:, 2:]
    bound = UNSEEN * bare.abs().max()
    if (one - changed)[:-1].abs().max() > bound:
        raise UserError(
            f"{source}: a {type(model).__name__} sees the tokens that it is to predict: give a causal language model"
        )
    if (one - bare).abs().max() > bound:
        raise UserError(
            f"{source}: a {type(model).__name__} gives other logits where a prompt is padded on the left, so rollouts "
            "would be wrong: take another architecture"
        )


def end_tokens(generation_config: GenerationConfig | None) -> list[Any]:
    found = None if generation_config is None else generation_config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]


def _adapter_at(path: str | Path) -> Any:
    """The settings of the adapter that lies there; None where there is none."""
    with _readable(path):
        file = find_adapter_config_file(str(path))
    if file is None:
        return None
    peft = _peft()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a setting that this version does not know is left out with a warning
            return peft.PeftConfig.from_peft_type(**json.loads(Path(file).read_text()))
    except Exception as error:
        raise UserError(f"{path} holds an adapter that peft {peft.__version__} does not know: {error}") from error


def _injected(model: PreTrainedModel, adapter: Any, path: str | Path) -> Any:
    """peft's wrapper of the model, with all weights of the adapter in their places."""
    peft = _peft()
    base = adapter.base_model_name_or_path
    with _silent(), _readable(path):
        wrapper = peft.get_peft_model(model, adapter)
        try:
            found = wrapper.load_adapter(str(path), "default", is_trainable=True)
            kinds = (found.missing_keys, "missing"), (found.unexpected_keys, "without a place")
            wrong = [f"{_first_of(sorted(names))} {what}" for names, what in kinds if names]
        except RuntimeError as error:  # weights of other shapes, which stand in the lines after the first
            wrong = [line.strip() for line in str(error).splitlines()][:2][-1:] or [type(error).__name__]
    adapter.base_model_name_or_path = base
    if wrong:
        todo = "name the base that it was trained on, with its tokens, or merge it there and give the whole model"
        raise UserError(f"the adapter {path} does not fit its base {base} ({'; '.join(wrong)}): {todo}")
    _untie(model)
    return wrapper


def _refuse_to_continue(adapter: Any, path: str | Path, rank: int) -> None:
    way_out = "leave lora_r out to merge it and train all weights"
    if adapter.peft_type.value != "LORA":
        raise UserError(f"lora_r: the adapter {path} is of type {adapter.peft_type.value}, not LORA: {way_out}")
    if adapter.r != rank:
        raise UserError(f"lora_r: the adapter {path} has rank {adapter.r}, not {rank}: set lora_r to it, or {way_out}")
    special = [name for name in NOT_CONTINUED if getattr(adapter, name, None)]
    special += ["bias"] if adapter.bias != "none" else []
    if special:
        raise UserError(f"lora_r: the adapter {path} has {special[0]}, with which it cannot be continued: {way_out}")


def _untie(model: Any) -> None:
    """Where an adapter stands on one of two tied weights they differ from now on: each its own, here and when saved."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for pair in tied.items():
        places = [model.get_submodule(name.rpartition(".")[0]) for name in pair]
        if not any(hasattr(place, "base_layer") or hasattr(place, "modules_to_save") for place in places):
            continue
        place = places[0]
        layer = getattr(place, "base_layer", getattr(place, "original_module", place))
        leaf = pair[0].rpartition(".")[2]
        weight = getattr(layer, leaf)
        own = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(layer, leaf, own)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def _shell(body: Any) -> PreTrainedModel:
    """The same model without adapters and weights, in the precision that it is saved in."""
    config = copy.deepcopy(body.config)
    with torch.device("meta"):
        shell = type(body)(config).to(body.origin.dtype)
    if hasattr(body, "_weight_conversions"):  # how the names in its source's files differ
        shell._weight_conversions = body._weight_conversions
    return shell


def _usual_targets(model: Any) -> Iterable[str]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = model.config.model_type
    if kind not in KNOWN:
        raise UserError(f"give lora_target_modules (all-linear, for example): peft knows none for {kind}")
    return KNOWN[kind]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install peft") from error
    return peft


@contextlib.contextmanager
def _silent() -> Any:
    """Its warnings are about what is refused or undone here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _readable(path: object) -> Any:
    """What transformers and peft raise about a model that they cannot load, in one line; they would wait at a pipe."""
    try:
        folder = Path(str(path))
        for file in folder.iterdir() if os.path.isdir(folder) else [folder]:
            if READ_BY_TRANSFORMERS.fullmatch(file.name) and files.would_wait(file):
                raise UserError(f"{file} is {files.kind(file)}, and a model is read from files")
        yield
    except UserError:
        raise
    except Exception as error:  # a file that is nothing like what they expect ends in errors of any kind
        lines = str(error).strip().splitlines() or [type(error).__name__]
        where = "" if os.path.lexists(str(path)) else ", which is no folder here"  # but a name of the Hub, maybe
        raise UserError(f"cannot load a model from {path}{where}: {lines[0]}") from error
