"""``python -m bench.report results.json``: tables, figures and one self-contained HTML page.

``--check-targets`` prints target, measured and verdict per row, and exits with 1 unless all are met.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

from bench import results as tables
from bench import targets
from bench.results import Results, Table

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ppo_kernels: benchmarks</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b263b; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #d8dee9; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; white-space: nowrap; }}
th, td {{ padding: 3px 9px; text-align: right; border-bottom: 1px solid #e5e9f0; }}
th:first-child, td:first-child {{ text-align: left; }}
td.text {{ text-align: left; white-space: normal; min-width: 16rem; }}
th {{ background: #f4f6fa; position: sticky; top: 0; }}
tr:hover td {{ background: #f9fafc; }}
.good {{ color: #0b6e4f; font-weight: 600; }} .bad {{ color: #b00020; font-weight: 700; }}
img {{ max-width: 100%; }}
p.note {{ color: #4a5568; max-width: 60rem; }} code {{ background: #f4f6fa; padding: 0 4px; }}
</style></head><body>
<h1>ppo_kernels: benchmarks</h1>
<p>{what}</p>
<ul>{machine}</ul>
{body}
</body></html>
"""

WHAT = (
    "ppo_kernels is a library of fused kernels for the arithmetic of reinforcement learning from human feedback "
    "(RLHF): log-probabilities of tokens, KL-shaped rewards, advantages (GAE), whitening and the clipped PPO losses. "
    "This page compares them with the code that trainers run today: their own functions, called from their own "
    "packages, on the same tensors in the same run. Every row was checked against float64 before it was timed. "
    "Shapes: [rows, vocabulary] for logits, [sequences, tokens] for everything else; fwd+bwd is the value and its "
    "gradient."
)


def overview(data: dict[str, Any]) -> str:
    """The table that a run of pytest ends with."""
    results = Results(data)
    lines = []
    if results.groups:
        lines.append(tables.speed_table(results).markdown())
    wrong = [row for row in results.untimed if row["state"] == "wrong"]
    lines += [f"WRONG, not timed: {row['group']}, {row['provider']}: {row['why']}" for row in wrong]
    return "\n".join(lines)


def facts(results: Results) -> list[str]:
    machine, run, versions = results.machine, results.run, results.versions
    cpu = machine.get("cpu", {}).get("brand_raw") or "unknown CPU"
    rate = run.get("GB/s", {})
    lines = [
        f"Machine: {machine.get('gpu', '') or cpu}, {machine.get('cores')} cores, {versions['threads']} threads,"
        f" instruction set {machine.get('isa')}; torch reads {rate.get('read')} GB/s, copies {rate.get('copy')} GB/s",
        f"Versions: ppo_kernels {versions['ppo_kernels']}, commit {versions['commit']}, torch {versions['torch']},"
        f" Python {machine.get('python_version')}",
        f"Run: {results.when} UTC, size {run.get('size')}, load averages at the end {run.get('load')}",
        "Command: make report (pytest bench --benchmark-only --bench-size full, then python -m bench.report)",
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
        targets.check(results)[0] if results.run.get("size") == "full" else None,
        tables.memory_table(results),
        tables.error_table(results),
        tables.scaling_table(results),
        tables.threads_table(results),
        tables.spread_table(results),
        tables.untimed_table(results),
    ]
    return [table for table in found if table is not None and table.lines]


def markdown(results: Results, figures: dict[str, Path]) -> str:
    parts = ["# ppo_kernels: benchmarks", WHAT, "\n".join(f"- {fact}" for fact in facts(results))]
    parts += [f"![{title}]({path.name})" for title, path in figures.items()]
    parts += [f"## {table.title}\n\n{table.note}\n\n{table.markdown()}" for table in sections(results)]
    return "\n\n".join(parts) + "\n"


CLASSES = {"met": "good", "linear": "good", "MISSED": "bad", "LOOK": "bad", "wrong": "bad"}


def _cell(text: str) -> str:
    slower = text.rstrip("~").endswith("×") and float(text.rstrip("~×")) < 1
    kind = "bad" if slower else CLASSES.get(text, "text" if len(text) > 40 else "")
    return f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr><td>{html.escape(line[0])}</td>{''.join(map(_cell, line[1:]))}</tr>" for line in table.lines)
    return (
        f'<h2>{table.title}</h2><p class="note">{html.escape(table.note)}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def page(results: Results, figures: dict[str, Path]) -> str:
    images = {
        title: f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for title, path in figures.items()
    }
    first, *rest = [_html(table) for table in sections(results)] or [""]
    body = "\n".join([first, *images.values(), *rest])
    machine = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts(results))
    return PAGE.format(what=html.escape(WHAT), machine=machine, body=body)


def write(results: Results, folder: Path) -> list[Path]:
    from bench import plots

    folder.mkdir(parents=True, exist_ok=True)
    figures = plots.draw(results, folder)
    (folder / "report.md").write_text(markdown(results, figures))
    (folder / "index.html").write_text(page(results, figures))
    return [folder / "report.md", folder / "index.html", *figures.values()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON that pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="folder for the report (default: beside the JSON)")
    parser.add_argument(
        "--check-targets", action="store_true", help="print the targets of the CPU table alone; 1 if missed"
    )
    options = parser.parse_args()
    results = Results(json.loads(options.results.read_text()))
    if options.check_targets:
        table, bad = targets.check(results)
        print(table.markdown())
        refuted = sum(line[-1].startswith("refuted") for line in table.lines)
        print(f"\n{len(table.lines) - bad - refuted} of {len(table.lines)} targets met, {refuted} refuted")
        return 1 if bad else 0
    print("\n".join(facts(results)), end="\n\n")
    print(tables.speed_table(results).markdown(), end="\n\n")
    print("Written:", *write(results, options.out or options.results.parent), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
