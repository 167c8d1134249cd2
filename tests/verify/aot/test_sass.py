"""The way through a kernel, on listings short enough to follow by hand: targets are the numbers of instructions."""

import pytest

from tests.verify.aot import sass

LOAD, STORE = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4"
NARROW, NARROW_STORE = "LDG.E R4, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R4"
WORK = "FADD R4, R4, R5"


def listing(*lines: str) -> list[str]:
    """Branches name an instruction, as in ``BRA 3``; the listing has its address."""
    found = []
    for line in lines:
        start, _, target = line.rpartition(" ")
        found.append(f"{start} {16 * int(target):#x}" if "BRA" in line or "CALL" in line else line)
    return found


LOOP = listing(WORK, LOAD, WORK, STORE, "@P0 BRA 1", "EXIT")
#: 3 to 5 load and store in whole vectors, 7 to 10 in pieces; both come together at 11, for the next round or the end.
ALTERNATIVES = listing(
    *(WORK, WORK, "@P1 BRA 7"),
    *(LOAD, LOAD, STORE, "BRA 11"),
    *(LOAD, WORK, WORK, STORE),
    *("@P0 BRA 1", "EXIT"),
)
#: The same, and the pieces lie before the vectors.
PIECES_FIRST = listing(
    *(WORK, WORK, "@P1 BRA 8"),
    *(LOAD, WORK, WORK, STORE, "BRA 11"),
    *(LOAD, LOAD, STORE),
    *("@P0 BRA 1", "EXIT"),
)
#: Both load as much, and the second stores more of it.
STORES = listing("@P0 BRA 5", LOAD, WORK, STORE, "BRA 8", LOAD, STORE, STORE, "EXIT")
#: What is last on the way lies before what it follows.
BACKWARDS = listing("BRA 3", STORE, "EXIT", LOAD, "@P0 EXIT", "BRA 1")
#: A loop within a loop; what is loaded in the inner one is stored behind it.
NESTED = listing(WORK, WORK, LOAD, "@P0 BRA 2", STORE, "@P1 BRA 1", "EXIT")
#: As sm_80 ends a loop: over the branch to its begin.
CALLED_OVER = listing(WORK, LOAD, STORE, "@P0 CALL.REL.NOINC 5", "BRA 1", "EXIT")


@pytest.mark.parametrize(
    ("lines", "way"),
    [
        (LOOP, [0, 1, 2, 3, 4, 5]),
        (ALTERNATIVES, [0, 1, 2, 3, 4, 5, 6, 11, 12]),
        (PIECES_FIRST, [0, 1, 2, 8, 9, 10, 11, 12]),
        (STORES, [0, 5, 6, 7, 8]),
        (BACKWARDS, [0, 3, 4, 5, 1, 2]),
        (NESTED, [0, 1, 2, 3, 4, 5, 6]),
        (CALLED_OVER, [0, 1, 2, 3, 5]),
    ],
)
def test_the_straight_way_is_one_round_of_every_loop_by_the_alternative_that_moves_most(lines, way):
    assert sass.straight(lines) == way


def test_of_alternatives_with_other_loads_the_asked_for_ones_are_taken():
    lines = listing("@P0 BRA 4", LOAD, STORE, "BRA 7", NARROW, WORK, NARROW_STORE, "EXIT")
    assert sass.straight(lines) == [0, 1, 2, 3, 7]
    assert sass.straight(lines, sass.SCALAR_LOAD, sass.SCALAR_STORE) == [0, 4, 5, 6, 7]
    assert sass.straight(listing(NARROW, NARROW_STORE, "EXIT")) == []


def test_a_round_is_begun_by_a_step_back_alone():
    order, rounds = sass._one_round(ALTERNATIVES)
    assert rounds == {(11, 1)}
    place = {at: i for i, at in enumerate(order)}
    assert sorted(order) == list(range(len(ALTERNATIVES)))
    for at in order:
        for to in sass._next(ALTERNATIVES, at):
            assert place[at] < place[to] or (at, to) in rounds
    assert sass._one_round(NESTED)[1] == {(3, 2), (5, 1)}


def test_a_way_by_stops_that_exclude_each_other_is_none():
    everywhere = range(len(ALTERNATIVES))
    _, rounds = sass._one_round(ALTERNATIVES)
    assert sass._through(ALTERNATIVES, [0, 3, 12], everywhere, rounds) == [0, 1, 2, 3, 4, 5, 6, 11, 12]
    assert sass._through(ALTERNATIVES, [0, 3, 7, 12], everywhere, rounds) == []
    assert sass._through(ALTERNATIVES, [0, 3, 7, 12], everywhere)[-3:] == [10, 11, 12]  # by a second round


def test_a_call_of_a_function_that_follows_is_no_end_of_a_loop():
    lines = listing(LOAD, STORE, "CALL.REL.NOINC 4", "EXIT", WORK, "RET.REL.NODEC R2 0")
    assert sass._next(lines, 2) == [3]
    assert sass.straight(lines) == [0, 1, 2, 3]


def test_a_way_that_would_leave_out_what_it_is_about_is_refused():
    with pytest.raises(AssertionError, match="most loads and stores"):  # which ends by itself, before the last one
        sass.straight(listing("@P0 BRA 5", LOAD, LOAD, STORE, "EXIT", LOAD, STORE, "EXIT"))
    with pytest.raises(AssertionError, match="no end of the kernel"):
        sass.straight(listing(WORK, "@P0 EXIT", LOAD, STORE, "BRA 0"))
