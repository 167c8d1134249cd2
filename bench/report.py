"""A run as tables and figures in Markdown, and what became of its targets."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench import clocks
from bench import results as tables
from bench.cases import Target, benchmarks
from bench.peers import PEERS
from bench.results import ON_A_GPU, Results, Table, duration, mib, micros, seconds, spread, times

WHAT = (
    "ppo_kernels is a library of fused kernels for the arithmetic of reinforcement learning from human feedback "
    "(RLHF): log-probabilities of tokens, KL-shaped rewards, advantages (GAE), whitening and the clipped PPO losses. "
    "This report compares them with the code that trainers run today: their own functions, called from their own "
    "packages, on the same tensors in the same run. Every row was checked against float64 before it was timed. "
    "Shapes: [rows, vocabulary] for logits, [sequences, tokens] for everything else; fwd+bwd is the value and its "
    "gradient."
)


def overview(results: Results) -> str:
    """The table that a run ends with."""
    lines = [tables.speed_table(results).markdown()] if results.groups else []
    lines += [f"WRONG, not timed: {row['group']}, {row['provider']}: {row['why']}" for row in results.wrong]
    return "\n".join(lines)


def facts(results: Results) -> list[str]:
    machine, run, versions, rate = results.machine, results.run, results.versions, results.rate
    lines = [
        f"Machine: {results.device}, {machine.get('cores')} cores, {versions['threads']} threads,"
        f" instruction set {machine.get('isa')}; torch reads {rate.get('read')} GB/s, copies {rate.get('copy')} GB/s",
        f"Versions: ppo_kernels {versions['ppo_kernels']}, commit {versions['commit']}, torch {versions['torch']},"
        f" Python {machine.get('python_version')}",
        *([clocks.summary(results.clocks)] if results.machine.get("gpu") else []),
        f"Run: {results.when} UTC, size {run.get('size')}, load averages at the end {run.get('load')}",
        f"Command: python -m bench --{run.get('size')} --report FOLDER",
    ]
    load, cores = (run.get("load") or [0.0, 0.0])[1], machine.get("cores") or 1  # of five minutes, what a run takes
    if load > cores + 0.5:
        lines.append(
            f"The machine was busy with other work (load {load} on {cores} cores): the figures are provisional"
        )
    return lines


def sections(results: Results) -> list[Table]:
    found = [
        tables.speed_table(results),
        tables.works_table(),
        tables.sources_table(results),
        *([targets(results)[0]] if results.run.get("size") in ("quick", "full") else []),
        tables.device_table(results),
        tables.per_provider(
            results,
            "Extra memory, MiB",
            "MiB that torch's allocator holds at once during a call, beyond the inputs; outputs included.",
            lambda row: mib(row["extra_info"]["extra_bytes"]),
        ),
        tables.per_provider(
            results,
            "Error",
            "Against the reference in float64: the largest error over the largest value of an output, worst of the "
            "outputs that the provider returns. A result rounded to bf16 is off by up to 4e-3.",
            tables.error,
        ),
        tables.scaling_table(results),
        tables.threads_table(results),
        tables.per_provider(
            results,
            "Times",
            "Medians and, in brackets, the interquartile range over them. Many above 25 %: run on a quieter machine.",
            lambda row: f"{duration(seconds(row))} ({spread(row):.0%})",
        ),
        tables.untimed_table(results),
    ]
    return [table for table in found if table.lines]


def markdown(results: Results, figures: dict[str, Path]) -> str:
    parts = ["# ppo_kernels: benchmarks", WHAT, "\n".join(f"- {fact}" for fact in facts(results))]
    parts += [f"![{title}]({path.name})" for title, path in figures.items()]
    parts += [f"## {table.title}\n\n{table.note}\n\n{table.markdown()}" for table in sections(results)]
    return "\n\n".join(parts) + "\n"


def write(results: Results, folder: Path) -> list[Path]:
    """The report; its figures where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    if importlib.util.find_spec("matplotlib"):
        from bench import plots

        figures = plots.draw(results, folder)
    (folder / "report.md").write_text(markdown(results, figures))
    return [folder / "report.md", *figures.values()]


def targets(results: Results, only: str = "") -> tuple[Table, int]:
    """What the library has to reach on a 2-core CPU or on a GPU, and how many were missed or not measured."""
    table = Table("Targets", "For a 2-core CPU, one run.", ["work", "target", "measured", "verdict"])
    size = "quick" if results.run.get("size") == "quick" else "full"
    if results.run.get("size") == "gpu":
        table.lines = [_on_device(results, group) for group, (case, _) in ON_A_GPU.items() if case.device_target]
    for case in benchmarks() if not table.lines else ():
        for shape in case.shapes.get(size, ()):
            wanted = [target for target in case.targets if size == "full" or target.provider not in PEERS]
            table.lines += [_against(results, case.group(shape), target) for target in wanted]
            if case.most_extra:
                table.lines.append(_memory(results, case.group(shape), case.most_extra(*shape)))
        if case.small_call and size == "quick":  # they take seconds, and every change may miss them
            groups = [case.group(case.small_call, threads) for threads in case.small_call_threads]
            table.lines += [_against(results, group, t) for group in groups for t in case.small_call_targets]
    table.lines = [line for line in table.lines if only in line[0]]
    return table, sum(line[-1] in ("not measured", "MISSED", "call MISSED") for line in table.lines)


def _on_device(results: Results, group: str) -> list[str]:
    mine = results.ours(group)
    if found := tables.device_target(results, group, mine):
        return [group, f"{found[0]} µs", f"{micros(seconds(results.groups[group][mine]))} µs", found[1]]
    return [group, "", "", "not measured"]


def _against(results: Results, group: str, target: Target) -> list[str]:
    measured = results.ratio(group, target.provider)
    if target.ratio >= 1:
        wanted, shown = f"≥ {target.ratio:g}× {target.provider}", times(measured)
    else:
        wanted = f"≤ {1 / target.ratio:g}× the {target.provider}"
        shown = times(measured and 1 / measured)
    return [group, wanted, shown, target.verdict(measured)]


def _memory(results: Results, group: str, most: int) -> list[str]:
    row = results.groups.get(group, {}).get("cpu")
    extra = row["extra_info"]["extra_bytes"] if row else None
    verdict = "not measured" if extra is None else "met" if extra <= most else "MISSED"
    return [group, f"≤ {mib(most)} MiB extra", "" if extra is None else f"{mib(extra)} MiB", verdict]


def verdict(table: Table) -> str:
    counts = [(text, sum(line[-1].startswith(text) for line in table.lines)) for text in VERDICTS]
    return f"{len(table.lines)} targets: " + ", ".join(f"{n} {text}" for text, n in counts if n)


VERDICTS = ("met", "refuted", "MISSED", "call MISSED", "not measured")
