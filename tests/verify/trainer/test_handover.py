"""Each ZeRO stage x what adapters stand on x tied weights or not x who generates: one run, whatever the layout."""

import pytest

from tests.trainer.test_handover import TIED
from tests.verify.trainer.test_vllm import VLLM, vllm, wide

__all__ = ["vllm"]

ALL = "all-linear"
MODELS = {
    "gpt2": {None: None} | TIED,
    "llama": {
        None: None,
        "layers": "q_proj",
        "embedding": "embed_tokens,up_proj",
        "head": "lm_head",
        "all": "all-linear",
    },
}
MODELS["llama, tied"] = MODELS["llama"]
CASES = [(kind, targets) for kind, known in MODELS.items() for targets in known]


@pytest.mark.parametrize("vllm", [1], indirect=True)
@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_the_layout_changes_no_step(tiny, vllm, kind, targets, engine):
    """Every rollout is also checked by the trainer itself, to the rounding of a CPU."""
    settings = VLLM | {"algorithm": "rloo", "generation_engine": engine, "model_config": wide(kind), "temperature": 1.0}
    if targets is not None:
        settings |= {"lora_r": 4, "lora_target_modules": MODELS[kind][targets]}
    runs = []
    for stage in range(4):
        trainer = tiny(deepspeed=f"ds_zero{stage}.json", **settings | {"learning_rate": 1e-2})
        rows = [trainer.train_step() for _ in range(3)]
        assert abs(rows[-1]["objective/kl"]) > 1e-3
        runs.append([{key: x for key, x in row.items() if not key.startswith("time/")} for row in rows])
    for run in runs[1:]:
        for mine, its in zip(runs[0], run, strict=True):
            assert mine == pytest.approx(its, abs=1e-3, nan_ok=True)
