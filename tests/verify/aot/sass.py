"""What a kernel's machine code does: the text that cuobjdump prints, and the instructions on the hot way through it."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from collections.abc import Set
from pathlib import Path

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
TARGET = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\d+,\s*)?(?:UR\d+,\s*)?`?\(?0x([0-9a-f]+)")
VECTOR_LOAD, VECTOR_STORE, EXP2 = r"\bLDG\S*\.128\b", r"\bSTG\S*\.128\b", r"\bMUFU\.EX2\b"
SCALAR_LOAD, SCALAR_STORE = r"\bLDG\.E(\.EF|\.EL)? R", r"\bSTG\.E(\.EF)? desc"
BARRIER, MEMBAR = r"\bBAR\.|\bUCGABAR_ARV\b", r"\bMEMBAR\."
ALLOWS_DEPENDENT, WAITS_FOR_PRIMARY = r"\bPREEXIT\b", r"\bACQBULK\b"
WORD_LOAD = re.compile(r"\bLDG\.E(?:\.EF|\.EL|\.NA|\.64|\.CONSTANT)* R\d+,")
TAKES_BYTES = re.compile(r"\bPRMT|\bLOP3.*\b0x(?:ff|ffff|ff00|ff0000|ff000000|1010101),|\bSHF\.R.*\b0x(?:8|10|18),")


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


def threads(binary: Path) -> dict[tuple[int, str], int]:
    """(architecture, mangled name) -> the threads of a block that the kernel was compiled for."""
    text = subprocess.run([cuobjdump(), "-elf", str(binary)], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[int, str], int] = {}
    arch, name = 0, ""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\.nv\.info\.(\S+)$", line):
            name = match[1]
        elif "EIATTR_MAX_THREADS" in line:
            found[arch, name] = int(re.search(r"0x([0-9a-f]+)", " ".join(lines[i + 1 : i + 4]))[1], 16)
    return found


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
    call = re.search(r"\bCALL\S* `?\(?0x([0-9a-f]+)", line)
    if call and conditional and int(call[1], 16) // 16 == at + 2:  # a loop's end on sm_80, over the branch to its begin
        return [at + 2, *following]
    if "BRA.DIV" in line:  # taken by a warp that has come apart
        return following
    if target is not None:
        return [target, *following] if conditional else [target]
    if re.search(r"\b(EXIT|RET)\b", line):
        return following if conditional else []
    return following


def _way(
    lines: list[str], start: int, end: int, inside: range, without: Set[tuple[int, int]] = frozenset()
) -> list[int] | None:
    """The fewest instructions from one to another, both included, by no step of ``without``."""
    before = {start: start}
    queue = collections.deque([start])
    while queue and end not in before:
        at = queue.popleft()
        for to in _next(lines, at):
            if to in inside and to not in before and (at, to) not in without:
                before[to] = at
                queue.append(to)
    if end not in before:
        return None
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def _one_round(lines: list[str]) -> tuple[list[int], set[tuple[int, int]]]:
    """The instructions in an order that every step keeps but those that begin a loop's next round, and these."""
    rounds, done, on_the_way = set(), [], {0}
    stack = [(0, iter(_next(lines, 0)))]
    seen = {0}
    while stack:
        at, following = stack[-1]
        to = next(following, None)
        if to is None:
            done.append(at)
            on_the_way.remove(at)
            stack.pop()
        elif to in on_the_way:
            rounds.add((at, to))
        elif to not in seen:
            seen.add(to)
            on_the_way.add(to)
            stack.append((to, iter(_next(lines, to))))
    return done[::-1], rounds


def _blocks(lines: list[str]) -> list[range]:
    starts = {0, *(t for line in lines if (t := _target(line)) is not None)}
    starts |= {i + 1 for i, line in enumerate(lines) if re.search(r"\b(BRA|EXIT|RET)\b", line)}
    cuts = sorted(start for start in starts if start < len(lines))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(lines)], strict=True)]


def _most(pattern: str, lines: list[str], blocks: list[range]) -> int:
    """The first instruction of the block that has most of these."""
    return max(blocks, key=lambda block: count(pattern, lines[block.start : block.stop])).start


def hot_loop(lines: list[str], over: str = "") -> list[int]:
    """One round of the loop that computes most exponentials: the way that loads vectors and does no rare work.

    With ``over`` it also goes through the block with most of these; empty if the loop has no block of its own for them.
    """
    blocks = _blocks(lines)
    core = _most(EXP2, lines, blocks)
    loops = [(t, i) for i, line in enumerate(lines) if (t := _target(line)) is not None and t <= core <= i]
    begin, end = min(loops, key=lambda loop: loop[1] - loop[0])
    inside = [block for block in blocks if begin <= block.start <= end]
    stops = {_most(VECTOR_LOAD, lines, inside), core}
    way = _through(lines, [begin, *sorted(stops), end], range(begin, end + 1))
    assert stops <= set(way), "the loop does not pass its loads and its exponentials in one round"
    if over:
        stops.add(_most(over, lines, [block for block in inside if block.start not in stops]))
        way = _through(lines, [begin, *sorted(stops), end], range(begin, end + 1))
    return way if stops <= set(way) else []


def straight(lines: list[str], loads: str = VECTOR_LOAD, stores: str = VECTOR_STORE) -> list[int]:
    """From the kernel's begin to its end by these loads and stores and by the words of a mask, without rare work.

    Of every loop it is the first round, and of alternatives the one that loads and stores most at a time, among those
    that end where the last of all loads and stores does. Empty if the kernel has no such load.
    """
    weights = dict.fromkeys([_most(EXP2, lines, _blocks(lines))] if count(EXP2, lines) else [], 0)
    for block in _blocks(lines):
        text = lines[block.start : block.stop]
        if weight := count(loads, text) + count(stores, text):
            weights[block.start] = weight
        elif loads == VECTOR_LOAD and any(_reads_bytes(lines, at) for at in block):
            weights[block.start] = 0
    if not any(count(loads, [line]) for line in lines):
        return []
    everywhere, (order, rounds) = range(len(lines)), _one_round(lines)
    place = {at: i for i, at in enumerate(order)}
    last = max((at for at, weight in weights.items() if weight), key=place.__getitem__)
    exits = [i for i in everywhere if re.search(r"\bEXIT\b", lines[i])]
    ways = [way for end in exits if (way := _way(lines, last, end, everywhere, rounds))]
    assert ways, "the last load or store is followed by no end of the kernel without another round of a loop"
    end = min(ways, key=len)[-1]
    way = []
    stops = [0, end]
    for stop in sorted(weights, key=lambda at: (-weights[at], place[at])):
        more = sorted({*stops, stop}, key=place.__getitem__)
        if found := _through(lines, more, everywhere, rounds):
            stops, way = more, found
    assert max(weights, key=weights.__getitem__) in way, "the block with most loads and stores ends in another way"
    return way


def _reads_bytes(lines: list[str], at: int) -> bool:
    """Whether it loads 4 or 8 bytes whose first reader takes them apart: a piece of a mask."""
    if not WORD_LOAD.search(lines[at]):
        return False
    filled = _written(lines[at])
    reader = next((line for line in lines[at + 1 :] if _read(line) & filled), "")
    return TAKES_BYTES.search(reader) is not None


def _through(
    lines: list[str], stops: list[int], inside: range, without: Set[tuple[int, int]] = frozenset()
) -> list[int]:
    """The shortest way by all stops in this order; empty if there is none."""
    way = stops[:1]
    for stop in stops[1:]:
        part = _way(lines, way[-1], stop, inside, without)
        if part is None:
            return []
        way += part[1:]
    return way


def on(lines: list[str], way: list[int]) -> list[str]:
    return [lines[i] for i in way]


def _written(line: str) -> set[int]:
    """The registers that a load fills."""
    match = re.search(r"\bLDG(\S*) R(\d+),", line)
    words = 4 if ".128" in match[1] else 2 if ".64" in match[1] else 1
    return set(range(int(match[2]), int(match[2]) + words))


def _read(line: str) -> set[int]:
    """The registers that an instruction names as its operands, the first of a pair for both."""
    line = re.sub(r"^@!?U?P\d+ ", "", line)
    name, _, operands = line.partition(" ")
    if not name.startswith(("ST", "RED", "ATOM", "MEMBAR", "BAR")):
        operands = operands.partition(",")[2]
    return {int(n) for n in re.findall(r"\bR(\d+)", operands)}


def first_use(lines: list[str], way: list[int]) -> int | None:
    """Instructions from the last load of the tile's data to the first that reads any of it, on the way.

    Negative: something waits for data while other data of the tile has not been asked for. The tile is what is loaded
    before the first barrier behind the first vector; its data are vectors and the words of a mask.
    """
    loads: list[int] = []
    waiting: set[int] = set()
    used = None
    for place, at in enumerate(way):
        if re.search(BARRIER, lines[at]) and any(re.search(VECTOR_LOAD, lines[way[i]]) for i in loads):
            break
        if used is None and _read(lines[at]) & waiting:
            used = place
        if re.search(VECTOR_LOAD, lines[at]) or _reads_bytes(lines, at):
            loads.append(place)
            waiting |= _written(lines[at])
    vectors = [place for place in loads if re.search(VECTOR_LOAD, lines[way[place]])]
    if not vectors:
        return None
    return (len(way) if used is None else used) - vectors[-1]


def barriers_before_data(lines: list[str], way: list[int]) -> int:
    """How often a block waits for its own threads before it asks for the first vector."""
    text = on(lines, way)
    first = next((i for i, line in enumerate(text) if re.search(VECTOR_LOAD, line)), 0)
    return count(BARRIER, text[:first])
