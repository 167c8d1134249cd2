"""What a kernel's machine code does: the text that cuobjdump prints, and the instructions on the hot way through it."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
TARGET = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\d+,\s*)?(?:UR\d+,\s*)?`?\(?0x([0-9a-f]+)")
VECTOR_LOAD, VECTOR_STORE, EXP2 = r"\bLDG\S*\.128\b", r"\bSTG\S*\.128\b", r"\bMUFU\.EX2\b"


def cuobjdump() -> str | None:
    """The CUDA toolkit's, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def functions(binary: Path) -> dict[tuple[int, str], list[str]]:
    """(architecture, mangled name) -> the kernel's instructions."""
    tool = cuobjdump()
    assert tool is not None, "cuobjdump is neither with Triton nor on PATH"
    text = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[int, str], list[str]] = {}
    arch = 0
    for line in text.splitlines():
        if match := re.search(r"code for sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            found[arch, match[1]] = lines = []
        elif match := INSTRUCTION.search(line):
            assert int(match[1], 16) == 16 * len(lines)
            lines.append(match[2])
    return {key: _without_padding(lines) for key, lines in found.items()}


def _without_padding(lines: list[str]) -> list[str]:
    while lines and re.match(r"NOP|BRA 0x", lines[-1]):
        lines = lines[:-1]
    return lines


def count(pattern: str, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def _target(line: str) -> int | None:
    match = TARGET.search(line)
    return int(match[1], 16) // 16 if match else None


def _next(lines: list[str], at: int) -> list[int]:
    line, target = lines[at], _target(lines[at])
    conditional = line.startswith("@") or re.search(r"BRA(\.\w+)*\s+!?U?P\d", line) or "BRA.DIV" in line
    following = [at + 1] if at + 1 < len(lines) else []
    if "BRA.DIV" in line:  # taken by a warp that has come apart
        return following
    if target is not None:
        return [target, *following] if conditional else [target]
    if re.search(r"\b(EXIT|RET)\b", line):
        return following if conditional else []
    return following


def _way(lines: list[str], start: int, end: int, inside: range) -> list[int] | None:
    """The fewest instructions from one to another, both included."""
    before = {start: start}
    queue = collections.deque([start])
    while queue and end not in before:
        at = queue.popleft()
        for to in _next(lines, at):
            if to in inside and to not in before:
                before[to] = at
                queue.append(to)
    if end not in before:
        return None
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def _blocks(lines: list[str]) -> list[range]:
    starts = {0, *(t for line in lines if (t := _target(line)) is not None)}
    starts |= {i + 1 for i, line in enumerate(lines) if re.search(r"\b(BRA|EXIT|RET)\b", line)}
    cuts = sorted(start for start in starts if start < len(lines))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(lines)], strict=True)]


def _most(pattern: str, lines: list[str], blocks: list[range]) -> int:
    """The first instruction of the block that has most of these."""
    return max(blocks, key=lambda block: count(pattern, lines[block.start : block.stop])).start


def hot_loop(lines: list[str]) -> list[str]:
    """One round of the loop that computes most exponentials: the way that loads vectors and does no rare work."""
    blocks = _blocks(lines)
    core = _most(EXP2, lines, blocks)
    loops = [(t, i) for i, line in enumerate(lines) if (t := _target(line)) is not None and t <= core <= i]
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    inside = range(begin, end + 1)
    loads = _most(VECTOR_LOAD, lines, [block for block in blocks if block.start in inside])
    return _through(lines, [begin, *sorted((loads, core)), end], inside)


def straight(lines: list[str]) -> list[str]:
    """From the kernel's begin to its end by its vector loads and stores, without rare work."""
    blocks = _blocks(lines)
    stops = [_most(EXP2, lines, blocks)]
    for block in blocks:
        text = lines[block.start : block.stop]
        if count(VECTOR_LOAD, text) or count(VECTOR_STORE, text):
            stops.append(block.start)
    ends = [i for i, line in enumerate(lines) if re.search(r"\bEXIT\b", line) and i >= max(stops)]
    return _through(lines, [0, *sorted(set(stops)), ends[0]], range(len(lines)))


def _through(lines: list[str], stops: list[int], inside: range) -> list[str]:
    way = [stops[0]]
    for stop in stops[1:]:
        part = _way(lines, way[-1], stop, inside)
        assert part is not None, f"no way from instruction {way[-1]} to {stop}"
        way += part[1:]
    return [lines[i] for i in way]
