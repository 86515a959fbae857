"""A disk that is full indeed: a tmpfs of a few MB, in a mount namespace that nothing else sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Spp, call_spp, results_of

from spp_cls.resume import LAST

MB = 6
# $1 is where the disk is mounted, $2 where what was on it is kept: the disk goes with the namespace.
ON_DISK = f"""
disk=$1 kept=$2; shift 2
mount -t tmpfs -o size={MB}m tmpfs "$disk" || exit 99
"$@"; code=$?
cp -r "$disk/." "$kept"
exit $code
"""

SAVE = """
import sys, torch
from pathlib import Path
from spp_cls.resume import AtomicCheckpointIO

def save(number, megabytes):
    content = {"number": number, "weights": torch.full((250_000 * megabytes,), float(number))}
    AtomicCheckpointIO().save_checkpoint(content, Path(sys.argv[1], "last.ckpt"))

save(1, 3)
try:
    save(2, 4)
except OSError as error:
    sys.exit(str(error))
"""

FILLER = """
from pathlib import Path
from lightning import Callback

class Filler(Callback):
    def __init__(self, disk, at, step):
        setattr(self, at, self.fill)
        self.path, self.step = Path(disk, "filler"), step

    def fill(self, trainer, *_, **__):
        if trainer.global_step == self.step and not self.path.exists():
            with self.path.open("wb", buffering=0) as file:
                try:
                    for _ in range(16 << 8):  # 16 MB at most, wherever this is
                        file.write(bytes(4096))
                except OSError:
                    pass
"""

Disk = tuple[Path, Path]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """Where the disk is mounted for a command, and where to find afterwards what was on it."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    if sys.platform != "linux" or on_disk((disk, kept), "true").returncode:
        pytest.skip("no mount namespace can be had here")
    return disk, kept


def on_disk(disk: Disk, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `command` where the folder `disk` is a disk of 6 MB."""
    own = "-m" if os.geteuid() == 0 else "-rm"
    return subprocess.run(
        ["unshare", own, "sh", "-c", ON_DISK, "sh", *map(str, (*disk, *command))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=disk[0].parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(disk: Disk) -> None:
    done = on_disk(disk, sys.executable, "-c", SAVE, disk[0])
    line = f"disk full: 4 MB needed, 3 MB free at {disk[0]}; last.ckpt is as it was"
    assert (done.returncode, done.stderr) == (1, f"{line}\n")
    assert [path.name for path in disk[1].iterdir()] == [LAST]
    state = torch.load(disk[1] / LAST, weights_only=True)
    assert state["number"] == 1 and state["weights"].eq(1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "at", "step", "saved", "line"),
    [
        # Between two saves.
        (
            ["checkpoint.every_steps=3"],
            "on_train_batch_start",
            5,
            4,
            "disk full: 1 MB needed, 0 MB free at {disk}/run/checkpoints; last.ckpt is as it was",
        ),
        # 36 steps an epoch: the history needs more than the block that it has.
        (
            ["data.batch_size=1"],
            "on_train_batch_start",
            37,
            36,
            "disk full: 0 MB free at {disk}/run; go on with spp train ckpt_path={disk}/run",
        ),
        # All is trained; results.json is left to write.
        ([], "on_test_start", 8, 8, "disk full: 0 MB free at {disk}/run; go on with spp train ckpt_path={disk}/run"),
        # Nothing is saved yet; timing.jsonl comes first.
        (["logger=tensorboard"], "on_train_start", 0, None, "disk full: 0 MB free at {disk}/run"),
    ],
    ids=["checkpoint", "history", "results", "timing"],
)
def test_a_run_that_fills_its_disk_says_so_in_a_line_and_can_be_gone_on_with(
    disk: Disk, tmp_path: Path, small: list[str], words: list[str], at: str, step: int, saved: int | None, line: str
) -> None:
    (tmp_path / "filler.py").write_text(FILLER)
    filler = {"_target_": "filler.Filler", "disk": disk[0], "at": at, "step": step}
    settings = [*small, "model.width=0.5", *words]
    added = [f"+callbacks.filler.{key}={value}" for key, value in filler.items()]
    train = [sys.executable, "-m", "spp_cls", "train", *settings, *added, f"hydra.run.dir={disk[0] / 'run'}"]
    done = on_disk(disk, *train)

    assert done.returncode == 1, done.stderr
    *before, last = done.stderr.splitlines()
    assert last == f"spp train: {line.format(disk=disk[0])}"
    assert not any(re.search("Traceback|Error", said) for said in before)
    run = disk[1] / "run"
    assert not list(run.rglob("*.tmp"))
    if saved is None:
        assert not (run / "checkpoints" / LAST).exists()
        return
    assert torch.load(run / "checkpoints" / LAST, weights_only=True)["global_step"] == saved

    # With space again: as if nothing had been.
    spp: Spp = partial(call_spp, cwd=tmp_path)
    assert spp("train", f"ckpt_path={run}", "+callbacks.filler.step=-1", "trust=true").code == 0
    whole = tmp_path / "whole"
    assert spp("train", *settings, f"hydra.run.dir={whole}").code == 0
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    found, expected = map(results_of, (run, whole))
    for results in (found, expected):  # but for what says that it went on with another callback
        results.pop("key"), results.pop("settings")
    assert found == expected
    ours, expected = (
        torch.load(folder / "checkpoints" / LAST, weights_only=True)["state_dict"] for folder in (run, whole)
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
