"""What the library has to reach on a 2-core CPU, checked on the results of one run with ``--bench-size full``."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import MIB, Results, Table, mib, seconds, times

LOGITS, TOKENS, LOSSES = "[1024, 151936]", "[256, 8192]", "[512, 2048]"
BACKWARD = "token_logprobs fwd+bwd {} [256, 151936]"
SMALL = "gae fp32 [8, 128]"


@dataclass(frozen=True)
class Target:
    """At least ``ratio`` times as fast as ``provider``."""

    group: str
    provider: str
    ratio: float


TARGETS = (
    *(
        Target(f"token_logprobs bf16 {LOGITS}", provider, ratio)
        for provider, ratio in (("reference", 12), ("eager", 4.5), ("torch.compile", 2), ("TRL", 5))
    ),
    Target(f"token_logprobs + entropy bf16 {LOGITS}", "TRL", 15),
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
    lines, bad = [], 0
    for target in TARGETS:
        measured = results.ratio(target.group, target.provider)
        met = None if measured is None else measured >= target.ratio
        lines.append((target.group, f"≥ {target.ratio:g}× {target.provider}", times(measured), met))
    for group, most in MOST_EXTRA.items():
        row = results.groups.get(group, {}).get("cpu")
        extra = row["extra_info"]["extra_bytes"] if row else None
        shown = "" if extra is None else f"{mib(extra)} MiB"
        lines.append((group, f"≤ {most / MIB:.2f} MiB extra", shown, None if extra is None else extra <= most))
    rows = results.groups.get(SMALL, {})
    overhead = seconds(rows["cpu"]) / seconds(rows["bare op"]) if {"cpu", "bare op"} <= set(rows) else None
    met = None if overhead is None else overhead <= MOST_OVERHEAD
    lines.append((SMALL, f"≤ {MOST_OVERHEAD:g}× the bare op", times(overhead), met))

    table = Table("Targets", "For a 2-core CPU, full size, one run.", ["work", "target", "measured", "verdict"])
    for group, target, measured, met in lines:
        bad += met is not True
        verdict = {None: "not measured", True: "met", False: "MISSED"}[met]
        table.lines.append([group, target, measured, verdict])
    return table, bad
