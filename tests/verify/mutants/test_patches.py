"""Every mutant still fits the sources; whether the tests kill it is what run.py says."""

from pathlib import Path

import pytest

from tests.lib.checkout import ROOT, header, patched
from tests.verify.mutants.run import mutants

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


def assert_exist(tests):
    for test in tests:
        file, _, name = test.partition("[")[0].partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file.removeprefix("tests/")).read_text(), test


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_applies(mutant):
    assert mutant.what
    assert mutant.tests
    assert_exist(mutant.tests)
    assert patched(mutant.patch, ROOT)


@pytest.mark.parametrize("path", sorted((HERE.parent / "sanitize").glob("*.patch")), ids=lambda path: path.stem)
def test_a_sanitizers_patch_applies(path):
    fields = header(path.read_text())
    assert set(fields) == {"Mutant", "Sanitizer", "Report", "Tests"}
    assert_exist(fields["Tests"].split())
    assert patched(path.read_text(), ROOT)
