"""What a trial of a sweep takes beyond its training, beside the time that `import lightning` takes.

    python scripts/bench_trial.py --rounds 5

In each round: `import lightning` in a process of its own, then a start of `spp sweep` that does three more trials. Of
each trial but the first of a start: the seconds from the end of the one before to its own end, less those in which it
trained and validated. So its process's start, reading the data, its tests, saving, drawing, telling are overhead. The
pictures are so few that there is next to nothing to test. Ends with a JSON line of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

TRIALS = 3  # of a round
SPACE = "space: {optimizer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}}\npruner: null\n"
SETTINGS = (
    *("data=folder", "data.root=pictures", "data.region=32", "data.resize=36", "data.batch_size=12", "sizes=single"),
    *("data.num_workers=0", "model.width=0.2", "model.levels=[2,1]", "trainer=cpu", "trainer.max_epochs=2"),
)


def seconds_of(command: list[str], folder: Path) -> float:
    """Wall seconds of a process."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - began


def write_pictures(folder: Path) -> None:
    """Three classes of 12 pictures of noise, 40 px."""
    chance = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2), ("test", 2)):
        for name in "abc":
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = chance.integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def beyond_training(trials: Path, first: int) -> list[float]:
    """Seconds of the trials `first`, `first + 1`, …, from the end of the one before, less training and validation."""
    found = []
    for number in range(first, first + TRIALS - 1):
        ends = [(trials / f"{each:05d}" / "results.json").stat().st_mtime for each in (number - 1, number)]
        epochs = [json.loads(line) for line in (trials / f"{number:05d}" / "timing.jsonl").read_text().splitlines()]
        found.append(ends[1] - ends[0] - sum(epoch["train_seconds"] + epoch["val_seconds"] for epoch in epochs))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "pictures")
        (folder / "conf" / "hparams_search").mkdir(parents=True)
        (folder / "conf" / "hparams_search" / "mine.yaml").write_text(SPACE)
        imports, trials, beyond = [], [], []
        for turn in range(rounds):
            imports.append(seconds_of([sys.executable, "-c", "import lightning"], folder))
            budget = TRIALS * (turn + 1)
            seconds_of([sys.executable, "-m", "spp_cls", "sweep", "mine", *SETTINGS, f"trials={budget}"], folder)
            trials += beyond_training(folder / "sweeps" / "mine" / "trials", budget - TRIALS + 1)
            beyond.append(statistics.median(trials[-TRIALS + 1 :]) - imports[-1])
            print(
                f"import lightning {imports[-1]:.2f} s; a trial beyond its training {trials[-TRIALS + 1 :]}", flush=True
            )
    print(
        json.dumps(
            {
                "n": len(trials),
                "import_lightning_s": round(statistics.median(imports), 2),
                "trial_beyond_training_s": round(statistics.median(trials), 2),
                "difference_s": round(statistics.median(beyond), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
