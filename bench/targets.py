"""What the library has to reach on a 2-core CPU, checked on the results of one run with ``--bench-size full``."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import MIB, Results, Table, mib, seconds, times

LOGITS, TOKENS, LOSSES = "[1024, 151936]", "[256, 8192]", "[512, 2048]"
BACKWARD = "token_logprobs fwd+bwd {} [256, 151936]"
SMALL = "gae fp32 [8, 128]"


@dataclass(frozen=True)
class Target:
    """At least ``ratio`` times as fast as ``provider``.

    A ratio that cannot be, for the reason in ``limit`` (bench/NOTES.md has the figures), is refuted; ``reached`` of it
    must be, all the same.
    """

    group: str
    provider: str
    ratio: float
    reached: float | None = None
    limit: str = ""

    def verdict(self, measured: float | None) -> str:
        if measured is None:
            return "not measured"
        if measured >= self.ratio:
            return "met"
        if self.reached is not None and measured >= self.reached:
            return f"refuted: {self.limit}"
        return "MISSED"


TARGETS = (
    *(
        Target(f"token_logprobs bf16 {LOGITS}", provider, ratio)
        for provider, ratio in (("reference", 12), ("eager", 4.5), ("torch.compile", 2))
    ),
    # What refutes a target is in bench/NOTES.md: time per logit of the arithmetic alone.
    Target(
        f"token_logprobs bf16 {LOGITS}",
        "TRL",
        5,
        reached=2.9,
        limit="0.13 ns per logit and core, the sums alone take 0.145",
    ),
    Target(
        f"token_logprobs + entropy bf16 {LOGITS}",
        "TRL",
        15,
        reached=8.5,
        limit="0.15 ns per logit and core, the sums alone take 0.178",
    ),
    *(
        Target(BACKWARD.format(dtype), provider, ratio)
        for dtype in ("bf16", "fp32")
        for provider, ratio in (("eager", 6), ("torch.compile", 4))
    ),
    Target(f"gae + whiten fp32 {TOKENS}", "verl", 60),
    Target(f"gae fp32 {TOKENS}", "OpenRLHF", 25),
    Target(f"kl_rewards + gae + whiten fp32 {TOKENS}", "verl", 60),
    Target(f"policy_loss fwd+bwd fp32 {LOSSES}", "eager", 10),
    Target(f"policy_loss fwd+bwd fp32 {LOSSES}", "torch.compile", 1.5),
)
#: The forward may keep a few numbers per row, never a temporary of the size of the logits.
MOST_EXTRA = {f"token_logprobs{entropy} bf16 {LOGITS}": 64 * 1024 for entropy in ("", " + entropy")}
#: A call may take this many times as long as the registered op inside it.
MOST_OVERHEAD = 3.0


def check(results: Results) -> tuple[Table, int]:
    """The table, and how many targets were missed or not measured."""
    lines = []
    for target in TARGETS:
        measured = results.ratio(target.group, target.provider)
        wanted = f"≥ {target.ratio:g}× {target.provider}"
        lines.append([target.group, wanted, times(measured), target.verdict(measured)])
    for group, most in MOST_EXTRA.items():
        row = results.groups.get(group, {}).get("cpu")
        extra = row["extra_info"]["extra_bytes"] if row else None
        shown = "" if extra is None else f"{mib(extra)} MiB"
        lines.append([group, f"≤ {most / MIB:.2f} MiB extra", shown, _verdict(extra, most)])
    rows = results.groups.get(SMALL, {})
    overhead = seconds(rows["cpu"]) / seconds(rows["bare op"]) if {"cpu", "bare op"} <= set(rows) else None
    lines.append([SMALL, f"≤ {MOST_OVERHEAD:g}× the bare op", times(overhead), _verdict(overhead, MOST_OVERHEAD)])

    table = Table("Targets", "For a 2-core CPU, full size, one run.", ["work", "target", "measured", "verdict"])
    table.lines += lines
    return table, sum(line[-1] in ("not measured", "MISSED") for line in lines)


def _verdict(measured: float | None, most: float) -> str:
    return "not measured" if measured is None else "met" if measured <= most else "MISSED"
