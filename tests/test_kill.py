from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_runs_that_are_killed_at_random_instants_end_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_campaign.py")), str(pictures), str(tmp_path), "26"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 100 and found["different"] == []
