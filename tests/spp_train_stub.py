"""What the ledger sees of `spp train`, in 30 ms: a script that leaves a run's files, or fails, as its words say.

`error=25 seconds=0.5 do=…`: do is fail, silent, kill (by itself), stubborn (hears no signal), other (another run).
The key is `key=…`, or in `keys.json` of the working folder by `seed`, or the end of the folder's name.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
from pathlib import Path

IMAGES = 20


def words_in(arguments: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in arguments)


def test(name: str, error: float) -> dict[str, object]:
    """A result of `IMAGES` pictures, of which the first are wrong."""
    bits = "".join("1" if i < round(error / 100 * IMAGES) else "0" for i in range(IMAGES)).ljust(
        -(-IMAGES // 8) * 8, "0"
    )
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    wrong = base64.b64encode(packed).decode()
    errors = {"top1_error": error, "top5_error": error / 5}
    return {"test": name, "images": IMAGES, **errors, "seconds": 0.5, "wrong": wrong}


def note(word: str, words: dict[str, str]) -> None:
    line = {"word": word, "time": time.monotonic(), "words": words, "process": os.getpid()}
    line["environment"] = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    line["of_ranks"] = sorted(
        name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_", "LOCAL_R", "MAST"))
    )
    with open("log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def key_of(words: dict[str, str], folder: Path) -> str:
    if "key" in words:
        return words["key"]
    keys = Path("keys.json")
    return str(json.loads(keys.read_text())[words["seed"]]) if keys.is_file() else folder.name.rpartition("_")[2]


def main() -> None:
    words = words_in(sys.argv[1:])
    saved = words.get("ckpt_path", "").strip("'")
    folder = Path(saved or words["hydra.run.dir"].strip("'"))
    if saved:
        words = {**json.loads((folder / "words.json").read_text()), **words}
    note("goes on" if saved else "begins", words)
    do = words.get("do", "")

    def save(number: int, frame: object) -> None:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text("weights")
        note("saved", words)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if do == "stubborn" else save)
    key = key_of(words, folder)
    (folder / "words.json").write_text(json.dumps(words))
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "key").write_text(("another" if do == "other" else key) + "\n")
    until = time.monotonic() + (0.0 if saved else float(words.get("seconds", "0")))
    while time.monotonic() < until:
        time.sleep(0.02)
    if do == "fail" and not saved:
        print("loading\n\nspp train: that cannot be\n\nSet the environment variable HYDRA_FULL_ERROR=1 for a trace.\n")
        sys.exit(2)
    if do == "silent":
        sys.exit(3)
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    names = [name if "@" in name else f"{name}@32" for name in words.get("tests", "[]")[1:-1].split(",") if name]
    error = float(words.get("error", "50"))
    tests = [test(name, error) for name in dict.fromkeys(["center_crop@32", *names])]
    about = {"index_hash": "x", "gpus": [], "processor": "a processor", "versions": {"spp_cls": "1", "torch": "2"}}
    (folder / "environment.json").write_text(json.dumps({**about, "spp_cls_commit": "c"}))
    (folder / "history.jsonl").write_text(
        '{"epoch": 0, "step": 1, "size": 26}\n'
        '{"epoch": 0, "step": 1, "train/loss": 0.5, "train/top1_error": 40.0, "val/top1_error": 50.0}\n'
    )
    (folder / "timing.jsonl").write_text('{"epoch": 0, "train_seconds": 60.0, "images_per_s": 100.0}\n')
    results = {"key": "another" if do == "other" else key, "seed": int(words.get("seed", "0")), "epochs": 1}
    settings = [f"{name}={value}" for name, value in words.items() if name not in ("hydra.run.dir", "ckpt_path")]
    ended = {**results, "val/top1_error": error, "settings": settings, "tests": tests}
    (folder / "results.json").write_text(json.dumps(ended))
    note("ends", words)


if __name__ == "__main__":
    main()
