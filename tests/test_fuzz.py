"""The first calls of the fuzz of the registered ops (tests/lib/fuzz.py); ``make verify PART=fuzz`` makes more."""

import pytest

from tests.lib import fuzz
from tests.lib.devices import ON_CPU

pytestmark = pytest.mark.host


@pytest.mark.parametrize("impl", ON_CPU)
def test_whatever_a_call_holds_it_ends_well(require_impl, impl):
    require_impl("gae", impl)
    assert fuzz.problem(impl, range(30 if impl == "triton" else 400)) == ""
