"""What a sweep sees of `spp train`, in 50 ms: epochs that take `seconds` each, a history that grows, a save on SIGTERM.

`x=0.3 key=k epochs=3 seconds=0.1 do=…`: the error after epoch e is 100 |x - 0.3| + 10 / (e + 1); do is fail, kill (by
itself), nan (a metric that is no number), other (no metric), stopped (once, by somebody else).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

from spp_train_stub import note, test, words_in

METRIC = "val/top1_error"


def error_at(x: float, epoch: int) -> float:
    return 100 * abs(x - 0.3) + 10 / (epoch + 1)


def main() -> None:
    words = words_in(sys.argv[1:])
    saved = words.get("ckpt_path", "").strip("'")
    folder = Path(saved or words["hydra.run.dir"].strip("'"))
    if saved:
        words = {**json.loads((folder / "words.json").read_text()), **words}
    epoch = int((folder / "checkpoints" / "last.ckpt").read_text()) if saved else 0
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    alone = os.open(folder / "training.lock", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note("twice", words)
        sys.exit(2)
    note("goes on" if saved else "begins", words)
    (folder / "words.json").write_text(json.dumps(words))
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "key").write_text(words["key"] + "\n")
    about = {"index_hash": "x", "gpus": [], "processor": "a processor", "versions": {"spp_cls": "1", "torch": "2"}}
    (folder / "environment.json").write_text(json.dumps({**about, "spp_cls_commit": "c"}))
    (folder / "timing.jsonl").write_text("")
    history = folder / "history.jsonl"
    before = history.read_text().splitlines(keepends=True) if history.is_file() else []
    history.write_text("".join(before[: 2 * epoch]))
    do = words.get("do", "")
    if do == "fail" or (do == "once" and not Path(words["key"]).exists()):
        Path(words["key"]).touch()
        print("loading\n\nspp train: that cannot be\n")
        sys.exit(2)
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "stopped" and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        asked.append(signal.SIGTERM)
    x, epochs = float(words["x"]), int(words.get("epochs", "1"))
    while epoch < epochs:
        until = time.monotonic() + float(words.get("seconds", "0"))
        while time.monotonic() < until or asked:
            if asked:
                (folder / "checkpoints").mkdir(exist_ok=True)
                beside = folder / "checkpoints" / "last.tmp"
                beside.write_text(str(epoch))
                beside.rename(folder / "checkpoints" / "last.ckpt")
                note("saved", words)
                sys.exit(143)
            time.sleep(0.01)
        with history.open("a") as file:
            file.write(json.dumps({"epoch": epoch, "step": epoch + 1, "size": 26, "loss": 1.0}) + "\n")
            file.write(
                json.dumps({"epoch": epoch, "step": epoch + 1, "train/loss": 1.0, METRIC: error_at(x, epoch)}) + "\n"
            )
        epoch += 1
    value = float("nan") if do == "nan" else error_at(x, epochs - 1)
    metrics = {} if do == "other" else {METRIC: value}
    results = {
        "key": words["key"],
        "seed": 0,
        "epochs": epochs,
        **metrics,
        "settings": [],
        "tests": [test("center_crop@32", 50)],
    }
    beside = folder / "results.tmp"
    beside.write_text(json.dumps(results))
    note("ends", words)
    beside.rename(folder / "results.json")


if __name__ == "__main__":
    main()
