"""The figures of the report, as PNG files."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, ScalarFormatter

from bench.peers import PEERS
from bench.results import MIB, Line, Results, duration, exponents, seconds, small_call, times
from bench.rows import BARE, COMPILE, EAGER, OURS, PROVIDERS, REFERENCE

matplotlib.use("Agg")
plt.rcParams |= {"axes.titlesize": 9, "axes.titleweight": "bold", "axes.labelsize": 8}
plt.rcParams |= {"figure.titlesize": 11, "savefig.dpi": 110}

GREEN, PLAIN = "#0b6e4f", "#6c757d"  # ours, and what is no one's
LINES = (GREEN, "#2176ae", "#ee6c4d", "#9b5de5", "#f2b134", "#bc4749", "#4cc9f0", "#33415c")
OTHERS = "#f2b134 #2176ae #9b5de5 #4cc9f0 #bc4749 #c77dff #80b918 #e5989b #7f5539 #33415c".split()
COLOURS = {"cpu": GREEN, "cuda": GREEN, "triton": "#3fa34d", REFERENCE: "#8d99ae", EAGER: "#5c677d", COMPILE: "#ee6c4d"}
COLOURS |= zip(PEERS, cycle(OTHERS), strict=False)


def _grid(count: int, columns: int, width: float, height: float) -> tuple[plt.Figure, list[Axes]]:
    rows = max(1, math.ceil(count / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:count])


def _save(figure: plt.Figure, path: Path, title: str, top: float = 0.97) -> Path:
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path)
    plt.close(figure)
    return path


def _caption(results: Results) -> str:
    threads = "" if results.machine.get("gpu") else f", {results.versions['threads']} thread(s)"
    return f"{results.device}{threads}, torch {results.versions['torch']}, {results.when[:10]}"


def speedups(results: Results, path: Path, groups: list[str]) -> Path:
    """One panel per row: what everyone takes, ours first."""
    figure, axes = _grid(len(groups), 3, 5.2, 2.7)
    for ax, group in zip(axes, groups, strict=True):
        rows = results.groups[group]
        names = [name for name in PROVIDERS if name in rows and name != BARE]
        values = [seconds(rows[name]) for name in names]
        ax.barh(range(len(names)), values, color=[COLOURS.get(name, PLAIN) for name in names], height=0.72)
        mine = results.ours(group)
        for i, (name, value) in enumerate(zip(names, values, strict=True)):
            ratio = "" if mine in (None, name) else f"  {times(value / seconds(rows[mine]))}"
            ax.text(value * 1.08, i, f"{duration(value)}{ratio}", va="center", fontsize=8)
        ylim = max(len(names), 5) - 0.4, -0.6
        ax.set(xscale="log", xlim=(min(values) / 2, max(values) * 12), ylim=ylim, title=group)
        ax.set_xlabel("time per call, seconds (log scale; shorter is better)", fontsize=7.5)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(names)), [f"ppo_kernels ({name})" if name in OURS else name for name in names])
        for label, name in zip(ax.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if name in OURS else "normal")
    return _save(figure, path, f"Time per call, and how many times ours ({_caption(results)})", top=0.985)


def overview(results: Results, path: Path, groups: list[str]) -> Path:
    """All rows in one panel: how many times longer than ours everyone takes."""
    figure, ax = plt.subplots(figsize=(10, 0.24 * len(groups) + 1.6))
    names = [name for name in (EAGER, COMPILE, *PEERS) if name in results.providers()]
    for name in names:
        if found := {i: ratio for i, group in enumerate(groups) if (ratio := results.ratio(group, name)) is not None}:
            ax.scatter([*found.values()], [*found], s=34, color=COLOURS[name], label=name, zorder=3)
    ax.axvline(1.0, color=GREEN, lw=2)
    ax.set(xscale="log", ylim=(len(groups) - 0.4, -0.6))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set_yticks(range(len(groups)), groups, fontsize=8)
    ax.set_xlabel("times as long as ppo_kernels, log scale (the green line is ours)", fontsize=9)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, loc="lower right")
    return _save(figure, path, f"How much longer others take ({_caption(results)})", top=0.99)


def rooflines(results: Results, path: Path) -> Path:
    """One panel per op: the rate that it reaches against the size of the data, and the limits."""
    works = list(dict.fromkeys(line.work for line in results.lines))
    figure, axes = _grid(len(works), 4, 3.7, 3.0)
    for ax, work in zip(axes, works, strict=True):
        lines = [line for line in results.lines if line.work == work]
        for line, marker in zip(lines, "os^", strict=False):
            mib = [size / MIB for size in line.bytes]
            ax.plot(mib, line.rates(), marker=marker, ms=4, lw=1.2, label=f"against {line.axis}")
        if best := results.best_rate(work):
            ax.axhline(best, color=GREEN, ls=":", lw=1.2, label=f"instructions: {best:.3g}")
        if read := results.rate.get("read"):
            ax.axhline(read, color="#bc4749", ls="--", lw=1.2, label=f"memory read: {read:.3g}")
        if cache := results.machine.get("cache MiB"):
            ax.axvline(cache, color=PLAIN, ls=":", lw=0.9, label=f"last cache: {cache:g} MiB")
        _log_axes(ax, work, "data per call, MiB", "rate, GB/s")
        ax.legend(fontsize=6.5, framealpha=0.6)
    what = "Rate against size with one thread, and what limits it: instructions within the caches, memory beyond"
    return _save(figure, path, f"{what} ({_caption(results)})")


UNITS = {"V": "vocabulary V", "T": "tokens per row T", "B": "rows B"}


def scaling(results: Results, path: Path) -> Path:
    axes_of: dict[str, list[Line]] = {}
    for line in results.lines:
        axes_of.setdefault(line.axis, []).append(line)
    figure, axes = _grid(len(axes_of), 3, 5.4, 4.6)
    for ax, (axis, lines) in zip(axes, axes_of.items(), strict=True):
        for line, colour in zip(lines, cycle(LINES), strict=False):
            xs, ys = zip(*line.points, strict=True)
            label = f"{line.work}: {exponents(line)[0]:.2f}"
            ax.plot(xs, [y * 1e6 for y in ys], marker="o", ms=3.5, lw=1.3, color=colour, label=label)
        end, top = xs[-1], max(line.points[-1][1] for line in lines) * 1e6 * 3
        ax.plot([end / 256, end], [top / 256, top], color="black", lw=1, ls="--", label="linear: 1.00")
        _log_axes(ax, f"against {UNITS[axis]}", UNITS[axis], "least time per call, µs")
        ax.legend(fontsize=7, title="growth exponent, upper half", title_fontsize=7, loc="upper left", framealpha=0.6)
    return _save(figure, path, f"Cost of ours against size, one thread ({_caption(results)})")


def _log_axes(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", title=title, xlabel=x, ylabel=y)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Every figure that the results have the rows for, by title."""
    small = [group for group in results.groups if small_call(group)]
    large = [group for group in results.groups if not small_call(group)]
    figures = {}
    if ours := [group for group in large if results.ours(group)]:
        figures["How much longer others take"] = overview(results, folder / "overview.png", ours)
    if large:
        figures["Speed against everyone else"] = speedups(results, folder / "speed.png", large)
    if small:
        title = "Small calls: what a call costs when there is nothing to compute"
        figures[title] = speedups(results, folder / "small_calls.png", small)
    if results.lines:
        figures["Rate and limits of each op"] = rooflines(results, folder / "roofline.png")
        figures["Growth with size"] = scaling(results, folder / "scaling.png")
    return figures
