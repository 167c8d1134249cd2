"""What can be set of the reinforcement-learning stage, and of a study of several runs of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from transformers.hf_argparser import HfArg

from .config import OptimizerConfig, SamplingConfig, SettingError

N = TypeVar("N", int, float)
PER_TOKEN = ("ppo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline")
WHITENED = ("ppo", "reinforce++", "reinforce++_baseline")
RATIO = (*PER_TOKEN, "rloo")  # algorithms of the clipped ratio of a token or of a response
# Settings that not every algorithm reads, and those that do. For all others they are refused unless they have their
# default value, or, of the critic's own training, named: files and presets for several algorithms hold them.
USED_BY = {
    "gamma": WHITENED,
    "lam": ("ppo",),
    "whiten_rewards": ("ppo",),
    "whiten_advantages": WHITENED,
    "loss_aggregation": PER_TOKEN,
    "surrogate": PER_TOKEN,
    "importance_sampling_level": PER_TOKEN,
    "rollout_correction": PER_TOKEN,
    "cliprange": (*RATIO, "p3o"),
    "cliprange_high": RATIO,
    "dual_clip": RATIO,
    "kl_estimator": RATIO,
    "mask_truncated_completions": RATIO,
    "mask_zero_variance_groups": RATIO,
    "weight_clip": ("p3o",),
    "p3o_variant": ("p3o",),
    "dpo_labels": ("online_dpo",),
    "critic_warmup_steps": ("ppo",),
    "critic_lora_r": ("ppo",),
    "value_model_path": ("ppo",),
    "value_model_init": ("ppo",),
    "critic_learning_rate": ("ppo",),
    "vf_coef": ("ppo",),
    "cliprange_value": ("ppo",),
}
NAMED = ("value_model_init", "critic_learning_rate", "vf_coef", "cliprange_value")


@dataclass
class PPOConfig(SamplingConfig, OptimizerConfig):
    """The reinforcement-learning stage."""

    algorithm: Literal["ppo", "p3o", "rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline", "online_dpo"] = (
        HfArg(default="ppo", help="What gives advantages and loss (algorithms.py).")
    )
    num_generations: int | None = HfArg(
        default=None, help="Responses per prompt. Default: the algorithm's own (1, 2 for pairs, 4 for groups)."
    )
    reward_model_path: str | None = HfArg(default=None, help="Reward model. Default: the result of reward.")
    value_model_init: Literal["reward", "policy"] = HfArg(
        default="policy", help="Critic from the reward model, or from the policy's body with a zero head."
    )
    value_model_path: str | None = HfArg(default=None, help="Critic from this model, of any size, instead.")
    critic_learning_rate: float | None = HfArg(default=None, help="Default: learning_rate.")
    critic_lora_r: int | None = HfArg(default=None, help="LoRA rank of the critic; its score head is trained too.")
    critic_warmup_steps: int = HfArg(default=0, help="First steps, in which the critic alone is trained.")
    total_steps: int = HfArg(default=100, help="Steps (rollout and updates).")
    num_ppo_epochs: int = HfArg(default=4, help="Passes over each rollout.")
    num_mini_batches: int = HfArg(default=1, help="Optimizer steps per pass.")
    kl_in: Literal["reward", "loss"] | None = HfArg(
        default=None, help="Where the KL penalty stands. Default: reward, but loss for grpo and dr_grpo."
    )
    kl_estimator: Literal["k1", "abs", "k2", "k3"] | None = HfArg(
        default=None,
        help="Default: k1 in the reward, where it is exact; k2 in the loss, which has the same gradient; k3 for grpo.",
    )
    kl_target: float | None = HfArg(
        default=None, help="Nats per response that an adaptive kl_coef aims at. Default: kl_coef stays."
    )
    kl_horizon: int = HfArg(default=10_000, help="Episodes over which the adaptive kl_coef moves.")
    score_scaling: Literal["none", "ref", "running"] = HfArg(
        default="none",
        help="ref: shift and scale scores to mean 0 and deviation 1 on the first rollout, which is the reference's. "
        "running: divide by the deviation of all scores so far.",
    )
    score_clip: float | None = HfArg(default=None, help="Bound on the score's magnitude, after its scaling.")
    missing_eos_penalty: float | None = HfArg(default=None, help="For the score of a response that does not end.")
    missing_eos_mode: Literal["subtract", "replace"] = HfArg(
        default="subtract", help="Subtract the penalty from that score, or put minus the penalty in its place."
    )
    whiten_rewards: bool = HfArg(default=False, help="Scale rewards to unit variance, keeping their mean.")
    whiten_advantages: bool = HfArg(default=True, help="Whiten advantages (ppo, reinforce++) over the global batch.")
    surrogate: Literal["clip", "cispo", "sapo", "dppo_tv", "dppo_kl"] = HfArg(
        default="clip", help="What the loss makes of the policy ratio (docs/losses.md)."
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token", "geometric"] = HfArg(
        default="token", help="Whose ratio: a token's, or its response's (sequence: GSPO; geometric: GMPO)."
    )
    rollout_correction: Literal["none", "truncate", "mask", "icepop"] = HfArg(
        default="none",
        help="For generation_engine vllm: weigh each token's loss by how much likelier it is to the trainer than to "
        "vLLM. truncate: bounded; mask: out of the bounds it is no token, nor for the critic; icepop: it counts as 0.",
    )
    rollout_correction_level: Literal["token", "sequence", "geometric"] = HfArg(
        default="token", help="Whose ratio that is: a token's, or its response's, as the product or the geometric mean."
    )
    rollout_correction_low: float | None = HfArg(default=None, help="Its lower bound; usual for mask: 0.5.")
    rollout_correction_high: float = HfArg(default=2.0, help="Its upper bound.")
    cliprange: float = HfArg(default=0.2, help="Clip range of the policy ratio.")
    cliprange_high: float | None = HfArg(default=None, help="Clip range above 1 (DAPO: 0.28). Default: cliprange.")
    dual_clip: float | None = HfArg(
        default=None, help="Bound of the loss at negative advantages, times |A|; 3 is usual."
    )
    weight_clip: float = HfArg(default=10.0, help="p3o: bound c of the pair's ratio weight, in [1/c, c].")
    p3o_variant: Literal["joint", "separate"] = HfArg(default="joint", help="p3o: clipping V2 (joint) or V1.")
    dpo_labels: Literal["hard", "soft"] = HfArg(
        default="hard", help="online_dpo: the better response wins, or wins with probability sigmoid(difference)."
    )
    loss_aggregation: (
        Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] | None
    ) = HfArg(default=None, help="How token losses add up. Default: the algorithm's own.")
    fused_head: Literal["auto", "on", "off"] = HfArg(
        default="auto",
        help="Log-probabilities from hidden states, without logits. auto: where those of a call would take more "
        "than 256 MiB, the head is a linear layer, at most scaled and capped, and ZeRO is below 3.",
    )
    entropy_coef: float = HfArg(default=0.0, help="Weight of the entropy bonus in the loss.")
    mask_truncated_completions: bool = HfArg(
        default=False, help="Learn nothing from responses that do not end; they still count in the baselines."
    )
    mask_zero_variance_groups: bool = HfArg(
        default=False, help="Learn nothing from prompts whose responses all score alike, the KL penalty included."
    )
    target_kl: float | None = HfArg(
        default=None,
        help="No more updates on a rollout once policy/approxkl_avg, the way from its sampler, is above. Per token; "
        "per response for rloo, p3o and online_dpo.",
    )
    vf_coef: float = HfArg(default=1.0, help="Weight of the value loss.")
    cliprange_value: float = HfArg(default=0.2, help="Clip range of the value.")
    gamma: float = HfArg(default=1.0, help="Discount.")
    lam: float = HfArg(default=0.95, help="GAE lambda.")
    ptx_coef: float = HfArg(
        default=0.0, help="Weight of the language-model loss on texts, mixed in (InstructGPT: 27.8)."
    )
    ptx_max_length: int = HfArg(default=1024, help="Those texts are cut to this many tokens.")
    ema_decay: float | None = HfArg(
        default=None, help="Also keep a moving average of the policy (usual: 0.992), saved as <output_dir>/train/ema."
    )
    eval_steps: int = HfArg(default=0, help="Evaluate every so many steps; 0 means before and after only.")
    log_completions_steps: int = HfArg(
        default=10, help="Every so many steps all responses go to completions.jsonl, some to report_to; 0: never."
    )
    metric_for_best_model: str | None = HfArg(
        default=None,
        help="A figure of the evaluations, such as eval/score: the model that is best in it is kept in "
        "<output_dir>/train/best.",
    )
    greater_is_better: bool = HfArg(default=True, help="Whether a larger metric_for_best_model is the better one.")
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many evaluations without a better metric_for_best_model."
    )
    save_steps: int = HfArg(default=50, help="Checkpoint every so many steps; 0 means none but the final model.")
    save_total_limit: int = HfArg(default=2, help="Committed checkpoints to keep.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="A checkpoint's path, or `latest`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_mini_batches:
            raise SettingError(
                f"batch_size {self.batch_size} must be a multiple of num_mini_batches {self.num_mini_batches}"
            )
        self._refuse_a_correction_of_nothing()
        if self.critic_warmup_steps >= self.total_steps:
            raise SettingError(
                f"critic_warmup_steps {self.critic_warmup_steps} must be below total_steps {self.total_steps}, or the "
                "policy is never trained"
            )
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            raise SettingError("early_stopping_patience needs metric_for_best_model")
        if self.metric_for_best_model is not None and not self.eval_steps:
            raise SettingError("metric_for_best_model needs eval_steps above 0: only evaluations are compared")
        if self.kl_target is not None and not self.kl_coef:
            raise SettingError("kl_target needs a kl_coef above 0 to start from")
        if self.kl_target is not None and self.kl_horizon <= 0.2 * self.batch_size:
            raise SettingError(
                f"kl_horizon {self.kl_horizon} must be above a fifth of batch_size {self.batch_size}: "
                "kl_coef could come to 0 or below in one step"
            )

    def _refuse_a_correction_of_nothing(self) -> None:
        if self.rollout_correction == "none":
            for name in ("rollout_correction_level", "rollout_correction_low", "rollout_correction_high"):
                if getattr(self, name) != getattr(PPOConfig, name):
                    raise SettingError(f"{name} is of rollout_correction: set that to truncate, mask or icepop")
        elif self.generation_engine == "hf":
            raise SettingError(
                f"rollout_correction {self.rollout_correction} is for rollouts of another engine, and generation_engine"
                " hf draws from the weights that are trained; set generation_engine vllm, or leave it out"
            )
        if self.rollout_correction_high <= 0.0:
            raise SettingError(
                f"rollout_correction_high {self.rollout_correction_high} leaves no token a weight: give one above 0"
            )
        if (self.rollout_correction_low or 0.0) > self.rollout_correction_high:
            raise SettingError(
                f"rollout_correction_low {self.rollout_correction_low} is above rollout_correction_high"
                f" {self.rollout_correction_high}"
            )


def without_use(algorithm: str) -> list[str]:
    """The settings that an algorithm does not read."""
    return [name for name, users in USED_BY.items() if algorithm not in users]


@dataclass
class FrontierConfig(PPOConfig):
    """Training runs: each of algorithms at each of kl_coefs with each of seeds, all of them on as many responses.

    Settings are those of train. With learning_rates or mini_batches each algorithm first gets its own: those that reach
    the best J = reward - kl_coef · KL with `seed` at the middle one of kl_coefs.
    """

    algorithms: str = HfArg(
        default="ppo,p3o,rloo,online_dpo", help="What to compare, separated by commas; online_dpo has soft labels here."
    )
    kl_coefs: str = HfArg(default="0.05,0.1,0.2", help="Values of kl_coef, separated by commas.")
    seeds: str | None = HfArg(
        default=None,
        help="Seeds of the runs, separated by commas. Default: seed; the two after it where something is chosen.",
    )
    learning_rates: str | None = HfArg(
        default=None, help="Learning rates, separated by commas, of which each algorithm gets its best one."
    )
    mini_batches: str | None = HfArg(
        default=None, help="Values of num_mini_batches, separated by commas, of which each algorithm gets its best one."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runs()
        if self.chooses and self.seed in self.run_seeds():
            raise SettingError(
                f"seeds {self.seeds}: with seed {self.seed} learning_rates and mini_batches are chosen, and what is "
                "compared needs others"
            )
        self.candidates()

    @property
    def chooses(self) -> bool:
        """Whether algorithms get settings of their own."""
        return self.learning_rates is not None or self.mini_batches is not None

    def candidates(self) -> list[tuple[float, int]]:
        """Learning rates with numbers of minibatches: what an algorithm chooses from."""
        rates = _numbers("learning_rates", self.learning_rates, float) or [self.learning_rate]
        batches = _numbers("mini_batches", self.mini_batches, int) or [self.num_mini_batches]
        return [(rate, number) for rate in rates for number in batches]

    def run_seeds(self) -> list[int]:
        given = _numbers("seeds", self.seeds, int)
        return given or ([self.seed + 1, self.seed + 2] if self.chooses else [self.seed])

    def names(self) -> list[str]:
        """Of the algorithms."""
        known = get_args(PPOConfig.__dataclass_fields__["algorithm"].type)
        names = [name.strip() for name in self.algorithms.split(",")]
        for name in names:
            if name not in known:
                raise SettingError(f"algorithms: {name!r} is none of {', '.join(known)}")
        return list(dict.fromkeys(names))

    def coefs(self) -> list[float]:
        return _numbers("kl_coefs", self.kl_coefs, float)

    def runs(self) -> list[tuple[str, float, int]]:
        """Algorithm, kl_coef and seed of each."""
        return [(name, coef, seed) for name in self.names() for coef in self.coefs() for seed in self.run_seeds()]


@dataclass
class CompareConfig(SamplingConfig):
    """Policies against each other on the same held-out prompts. What is not given is as it was in the runs."""

    runs: str | None = HfArg(
        default=None,
        help="What to compare, separated by commas, or in front of all options with blanks: output_dirs of train "
        "commands, or folders of models, each as NAME=FOLDER if the folder's own name does not tell.",
    )
    judge: str | None = HfArg(
        default=None,
        help="A function that decides beside the reward and the task's gold score: `file.py:name`, written as one for "
        "reward_function.",
    )
    reward_model_path: str | None = HfArg(default=None, help="Reward model. Default: that of the runs.")

    def entries(self) -> dict[str, Path]:
        """Names and folders."""
        given = [part.strip() for part in (self.runs or "").split(",") if part.strip()]
        found: dict[str, Path] = {}
        for part in given:
            name, equals, folder = part.partition("=")
            if not equals or Path(part).exists():
                folder, name = part, _own_name(Path(part))
            times = sum(known.partition(" (")[0] == name for known in found)
            found[f"{name} ({times + 1})" if times else name] = Path(folder)
        return found


def _own_name(place: Path) -> str:
    """The folder's, but for those that are called alike in every run."""
    parts = [part for part in place.absolute().parts if part not in ("train", "model")]
    return parts[-1]


def _numbers(name: str, text: str | None, kind: type[N]) -> list[N]:
    """Those of a list with commas, each once."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(","))) if text is not None else []
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise SettingError(f"{name} must be {what} separated by commas, not {text!r}") from error
