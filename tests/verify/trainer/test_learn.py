"""make verify PART=learn: how far every algorithm comes on the task whose optimum is known, three seeds each.

The score is (J - J of the reference) / (J* - J of the reference), with J = E[r] - 0.1 · KL computed by enumeration.
"""

import pytest

from python_trainer.logging import read
from python_trainer.ppo import Trainer
from python_trainer.ppo_config import PPOConfig
from python_trainer.settings import load
from tests.lib.trainer import ROOT

from .conftest import learned

STEPS = 60
LEAST = {
    "PPO": (0.90, {}),
    "P3O, separate clipping (V1)": (0.95, {"algorithm": "p3o", "p3o_variant": "separate"}),
    "P3O, joint clipping (V2)": (0.95, {"algorithm": "p3o"}),
    "RLOO": (0.93, {"algorithm": "rloo"}),
    "Dr. GRPO": (0.80, {"algorithm": "dr_grpo"}),
    "Dr. GRPO, ratios of responses (GSPO)": (0.80, {"algorithm": "dr_grpo", "importance_sampling_level": "sequence"}),
    "Dr. GRPO, CISPO": (0.80, {"algorithm": "dr_grpo", "surrogate": "cispo", "cliprange": 1.0, "cliprange_high": 4.0}),
    "Dr. GRPO, SAPO": (0.80, {"algorithm": "dr_grpo", "surrogate": "sapo"}),
    "REINFORCE++": (0.90, {"algorithm": "reinforce++"}),
    "online DPO, soft labels": (0.95, {"algorithm": "online_dpo", "dpo_labels": "soft"}),
}
pytestmark = pytest.mark.learn


def rows(folder, **settings) -> list[dict]:
    """The rows with exact figures of a run on the exact task."""
    options = [f"--{name}={value}" for name, value in ({"kl_coef": 0.1} | settings).items()]
    config = load("train", "exact_cpu.yaml", [f"--output_dir={folder}", "--disable_tqdm", *options], PPOConfig)
    Trainer(config).train()
    return [row for row in read(folder / "train" / "metrics.jsonl") if "exact/score" in row]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LEAST)
def test_comes_close_to_the_optimum(tmp_path, name, seed):
    least, settings = LEAST[name]
    last = rows(tmp_path, seed=seed, total_steps=STEPS, **settings)[-1]
    learned(name, least, seed, last)
    assert last["exact/score"] >= least


@pytest.mark.parametrize("preset", ["gspo", "dapo", "cispo"])
def test_presets_raise_the_reward(tmp_path, preset):
    """Their objective is another one (advantages over the group's deviation), so the reward alone is asked for."""
    found = rows(tmp_path, total_steps=STEPS, preset=preset)
    assert found[-1]["exact/reward"] > found[0]["exact/reward"] + 0.2


def test_what_depends_on_the_prompt_alone_moves_p3o_not_at_all_and_ppo_out_of_bounds(tmp_path):
    """Five times the prompt's number is added to every score: the order of responses and the optimum stay."""
    curves = {}
    for name, settings in (("PPO", {}), ("P3O", {"algorithm": "p3o"})):
        for shift in (0.0, 5.0):
            folder = tmp_path / f"{name}-{shift}"
            found = rows(folder, total_steps=30, eval_steps=5, score_shift=shift, **settings)
            curves[name, shift] = {row["step"]: row["exact/score"] for row in found}
    draw(curves)
    for step, score in curves["P3O", 0.0].items():
        assert curves["P3O", 5.0][step] == pytest.approx(score, abs=1e-4)
    assert curves["PPO", 0.0][30] > 0.85
    assert curves["PPO", 5.0][30] < 0.5


def draw(curves: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for (name, shift), points in curves.items():
        label = f"{name}, r + 5 · prompt number" if shift else f"{name}, r"
        colour = "tab:blue" if name == "P3O" else "tab:orange"
        axis.plot(points.keys(), points.values(), "--o" if shift else "-", color=colour, label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("step")
    axis.set_ylabel("share of the way to the best J")
    axis.set_ylim(-1, 1.1)
    axis.grid(alpha=0.3)
    axis.legend()
    folder = ROOT / "build" / "learn"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "translation.png", dpi=120)
    pyplot.close(figure)
