"""Every mutant still fits the sources; whether the tests kill it is what run.py says."""

from pathlib import Path

import pytest

from tests.lib.checkout import ROOT, header, patched
from tests.verify.mutants.run import mutants

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_applies(mutant):
    assert mutant.what
    assert mutant.tests
    assert patched(mutant.patch, ROOT)


@pytest.mark.parametrize("path", sorted((HERE.parent / "sanitize").glob("*.patch")), ids=lambda path: path.stem)
def test_a_sanitizers_patch_applies(path):
    assert set(header(path.read_text())) == {"Mutant", "Sanitizer", "Report", "Tests"}
    assert patched(path.read_text(), ROOT)
