from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

# How much of the campaigns is done; all by default, less where a slow machine shall end within half an hour.
SHARE = float(os.environ.get("SPP_PROVE_SHARE", "1"))


def campaign(tmp_path: Path, name: str, *arguments: str | Path, script: str = "kill_campaign.py") -> dict[str, Any]:
    """What the campaign `name` of the script found."""
    command = [sys.executable, str(Path(__file__).with_name(script)), name, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def is_another_disk(place: Path, here: Path) -> bool:
    """With space for two checkpoints."""
    if not os.access(place, os.W_OK) or place.stat().st_dev == here.stat().st_dev:
        return False
    return shutil.disk_usage(place).free > 200_000_000


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on another file system than temporary files, or among those where there is none."""
    here = Path(tempfile.gettempdir())
    places = [Path("/dev/shm"), Path.cwd(), Path.home(), here]
    there = next(place for place in places if place == here or is_another_disk(place, here))
    print(f"temporary files in {here}, checkpoints in {there}")
    with tempfile.TemporaryDirectory(dir=there) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_a_few_kills_change_no_bit_and_tear_no_file(pictures: Path, tmp_path: Path, other_disk: Path) -> None:
    found = campaign(tmp_path, "few", pictures, tmp_path, other_disk / "torn")
    assert (found["hooks"]["kills"], found["hooks"]["alive"], found["hooks"]["different"]) == (6, [], [])
    assert (found["torn"]["kills"], found["torn"]["torn"]) == (5, [])


@pytest.mark.slow
def test_runs_that_are_killed_at_random_instants_end_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    found = campaign(tmp_path, "random", pictures, tmp_path, str(math.ceil(25 * SHARE)))
    assert found["kills"] >= 100 * SHARE and found["different"] == []


@pytest.mark.slow
@pytest.mark.parametrize("way", range(6))
def test_runs_that_are_killed_in_any_hook_end_with_the_same_bits(pictures: Path, tmp_path: Path, way: int) -> None:
    found = campaign(tmp_path, "hooks", pictures, tmp_path, str(way), str(round(1 / SHARE)))
    assert found["alive"] == [] and found["different"] == []
    assert found["kills"] == sum(found["hooks"].values()) >= 120 // round(1 / SHARE)
    if SHARE < 1:
        return
    others = ("test", "predict", "sanity", "exception")
    called = {n for n in dir(Callback) if n.startswith("on_") and not any(other in n for other in others)}
    assert called | {"setup", "teardown", "state_dict", "load_state_dict"} < set(found["hooks"])


@pytest.mark.slow
def test_a_kill_tears_no_checkpoint(tmp_path: Path, other_disk: Path) -> None:
    found = campaign(tmp_path, "torn", other_disk / "torn", "60", str(math.ceil(50 * SHARE)))
    assert found["kills"] >= 50 * SHARE and found["torn"] == []
    assert found["left_over"] > 0  # of a save that was under way


on_two_ranks = partial(campaign, script="rank_campaign.py")


@pytest.mark.slow
def test_when_either_of_two_ranks_is_killed_the_other_ends_and_the_bits_are_the_same(
    pictures: Path, tmp_path: Path
) -> None:
    found = on_two_ranks(tmp_path, "kills", pictures, tmp_path, str(math.ceil(20 * SHARE)))
    assert sum(found["kills"]) >= 20 * SHARE and found["different"] == []
    assert min(found["kills"]) > 0 or SHARE < 1


@pytest.mark.slow
def test_one_rank_then_two_then_one_are_one_run(pictures: Path, tmp_path: Path) -> None:
    found = on_two_ranks(tmp_path, "change", pictures, tmp_path)
    assert found["same_stream"] and found["steps"] == 20
    assert min(found["steps_by_rank"]) > 0 and found["largest_difference"] < 1e-9


@pytest.mark.slow
def test_a_rank_that_is_left_alone_says_whom_it_misses(tmp_path: Path) -> None:
    found = on_two_ranks(tmp_path, "watch", tmp_path)
    assert found["0"] == ["", "spp: rank 0 ended before its time, so rank 1 does\n"]
    assert found["1"] == ["spp: rank 1 ended before its time, so rank 0 does\n", ""]
