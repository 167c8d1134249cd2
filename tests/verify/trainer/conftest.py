"""The fixtures of the trainer's tests, and the table of `make verify PART=learn`."""

from tests.lib.trainer import folder, ratings, tiny

__all__ = ["folder", "learned", "ratings", "tiny"]

LEARNED: dict[str, dict] = {}  # what the part learn shows at its end


def pytest_collection_modifyitems(config, items):
    """The runs of `make verify PART=learn` take long: only `-m learn` starts them."""
    if "learn" in config.option.markexpr:
        return
    chosen = [item for item in items if not item.get_closest_marker("learn")]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("learn")])
    items[:] = chosen


def learned(name: str, least: float, seed: int, row: dict) -> None:
    LEARNED.setdefault(name, {"least": least, "rows": {}})["rows"][seed] = row


def pytest_terminal_summary(terminalreporter):
    if not LEARNED:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line("| algorithm | seed 0 | seed 1 | seed 2 | KL | at least |")
    terminalreporter.write_line("|---|---:|---:|---:|---:|---:|")
    for name, entry in LEARNED.items():
        rows = entry["rows"]
        scores = " | ".join(f"{rows[seed]['exact/score']:.3f}" if seed in rows else "" for seed in range(3))
        kl = sum(row["exact/kl"] for row in rows.values()) / len(rows)
        terminalreporter.write_line(f"| {name} | {scores} | {kl:.2f} | {entry['least']:.2f} |")
