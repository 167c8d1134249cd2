"""Writes build_info.cpp, the facts about a build: ``build_info.py OUTPUT NAME=VALUE ...``.

CMake runs it at every build, since the sources may have changed, and it leaves a file alone that would stay the same.
"""

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = """#include "build_info.h"

namespace ppo {{

const BuildFact kBuildFacts[] = {{
{facts}}};
const int kNumBuildFacts = sizeof(kBuildFacts) / sizeof(kBuildFacts[0]);

}}  // namespace ppo

// _C_cuda is no Python module: _native.py reads its hash through this.
extern "C" __attribute__((visibility("default"))) const char* ppo_kernels_source_hash() {{ return "{source_hash}"; }}
"""


def git_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 and (ROOT / ".git").exists() else ""


output, *pairs = sys.argv[1:]
facts = dict(pair.split("=", 1) for pair in pairs)
facts["git_commit"] = git_commit()
facts["source_hash"] = runpy.run_path(str(ROOT / "ppo_kernels" / "_source_hash.py"))["source_hash"]()
lines = "".join(f'    {{"{name}", R"({value})"}},\n' for name, value in facts.items())
text = TEMPLATE.format(facts=lines, source_hash=facts["source_hash"])
path = Path(output)
if not path.exists() or path.read_text() != text:
    path.write_text(text)
