"""The newcomer's page, run word for word."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.lib.trainer import ROOT, metric_rows

PAGE = ROOT / "docs" / "first_model.md"


def test_the_page_leads_from_nothing_to_a_trained_model(tmp_path):
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "\nodd\n" in done.stdout
    run = tmp_path / "runs" / "first"
    first, *_, last = [row for row in metric_rows(run) if "objective/scores" in row]
    assert first["objective/scores"] < 0.9
    assert last["objective/scores"] > 1.2
    figures = json.loads((run / "eval" / "metrics.json").read_text())
    assert figures["policy"]["eval/score"] > figures["reference"]["eval/score"] + 0.3
