"""How long `spp runs` and `spp report` take for many runs and for a long one, how large pages are, what they ask.

    python scripts/bench_report.py --runs 500 --steps 100000

The runs are invented: a grid of learning rates, widths and seeds, and one run with all that a run folder can hold, 100
classes, scores and pictures. Each command is a process of its own. Where Chromium is there it loads both pages: seconds
until all is loaded, and whether the page asks any other host for anything. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from PIL import Image

from spp_cls.door import compose, register_resolvers

SPP = (sys.executable, "-m", "spp_cls")
RATES, WIDTHS = (0.001, 0.003, 0.01, 0.03, 0.1), (0.25, 0.5, 1.0, 2.0)
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
BROWSER = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *QUIET)


def default_config() -> dict[str, Any]:
    """What `spp train` does when nothing is said."""
    register_resolvers()
    config: Any = OmegaConf.to_container(compose("train", ["callbacks=none", "logger=none", "name=x"]), resolve=True)
    return dict(config)


def write_run(folder: Path, config: dict[str, Any], error: float, steps: int, epochs: int, seed: int = 0) -> None:
    """A finished run of `steps` steps, at 180 and 224 px in turn, that ends at `error` percent in validation."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))
    about = {
        "command": ["spp", "train", f"seed={seed}"],
        "host": "bench",
        "processor": "invented",
        "gpus": [],
        "spp_cls_commit": "0" * 40,
        "versions": {"spp_cls": "0", "torch": "0"},
        "folder": str(folder.parent),
    }
    (folder / "environment.json").write_text(json.dumps(about))
    (folder / "key").write_text(f"{seed:016x}\n")
    noise, per_epoch, lines, timing = chance.normal(0, 0.15, steps), steps // epochs, [], []
    for step in range(steps):
        epoch, done = step // per_epoch, (step + 1) / steps
        row = {"epoch": epoch, "step": step + 1, "size": (180, 224)[epoch % 2], "lr": 0.1 * (1 - done)}
        lines.append({**row, "loss": float(4 * (1 - done) ** 2 + error / 50 + noise[step])})
        if (step + 1) % per_epoch == 0:
            now = error + (95 - error) * (1 - done) ** 2
            row = {"epoch": epoch, "step": step + 1, "train/loss": now / 25, "train/top1_error": now - 3}
            lines.append({**row, "val/loss": now / 24, "val/top1_error": now})
            speed = {"images_per_s": 900 + 90 * float(chance.normal()), "waiting_for_data": 0.02, "peak_memory_mb": 900}
            timing.append(
                {"epoch": epoch, "images": 32 * per_epoch, "train_seconds": 30.0, "val_seconds": 1.0, **speed}
            )
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))
    sizes = [128, 160, 180, 224, 256]
    tests = [{"test": f"center_crop@{size}", "top1_error": error + abs(size - 210) / 20} for size in sizes]
    results = {"seed": seed, "settings": [], "epochs": epochs, "val/top1_error": error, "test/top1_error": error + 1}
    (folder / "results.json").write_text(json.dumps({**results, "key": f"{seed:016x}", "tests": tests}))


def write_answers(folder: Path, root: Path, classes: Sequence[str], images: int, seed: int = 0) -> None:
    """What `spp evaluate` leaves of a run whose pictures, drawn here, lie in `root`."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, len(classes), images)
    scores = chance.gamma(0.3, size=(images, len(classes))) + 1e-6
    scores[np.arange(images), labels] += chance.gamma(2.0, size=images)
    paths = [f"{i % 200:03}.jpg" for i in range(images)]
    root.mkdir(parents=True, exist_ok=True)
    for path in paths[:200]:
        coarse = Image.fromarray(chance.integers(0, 256, (4, 5, 3), np.uint8))
        coarse.resize((500, 400), Image.Resampling.BICUBIC).save(root / path)
    evaluation = folder / "evaluations" / "test_center_crop_224"
    evaluation.mkdir(parents=True)
    scores /= scores.sum(1, keepdims=True)
    kept = {
        "paths": np.array(paths),
        "labels": labels,
        "scores": scores.astype(np.float32),
        "classes": np.array(classes),
    }
    np.savez(evaluation / "scores.npz", **kept)


def write_all(root: Path, runs: int, steps: int) -> None:
    """`runs` runs in root/runs, and one of `steps` steps in root/long."""
    config = default_config()
    config["trainer"]["max_epochs"] = 20
    for i in range(runs):
        rate, width = RATES[i % len(RATES)], WIDTHS[i // len(RATES) % len(WIDTHS)]
        own = {**config, "seed": i, "model": {**config["model"], "width": width, "seed": i}}
        own["optimizer"] = {**config["optimizer"], "lr": rate}
        chance = np.random.default_rng(i)
        error = 30 + 8 * abs(np.log10(rate / 0.01)) - 5 * width + float(chance.normal())
        write_run(root / "runs" / f"{i:03}", own, float(error), steps=400, epochs=20, seed=i)
    config["trainer"]["max_epochs"] = 100
    config["data"] = {**config["data"], "root": str(root / "pictures")}
    write_run(root / "long", config, 25.0, steps=steps, epochs=100)
    write_answers(root / "long", root / "pictures", [f"class {k}" for k in range(100)], images=5000)


def timed(*words: str, cwd: Path) -> float:
    began = time.perf_counter()
    subprocess.run([*SPP, *words], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 2)


def loaded(page: Path, chromium: str) -> dict[str, Any]:
    """Milliseconds until `page` is loaded in a browser, and what it asked of other hosts."""
    with tempfile.TemporaryDirectory() as folder:
        frame, log = Path(folder, "frame.html"), Path(folder, "net.json")
        script = "began = performance.now(); done = () => document.title = Math.round(performance.now() - began)"
        frame.write_text(f"<script>{script}</script><iframe src='{page.as_uri()}' onload='done()'></iframe>")
        options = (*BROWSER, f"--user-data-dir={folder}/user", f"--log-net-log={log}", "--dump-dom")
        done = subprocess.run([chromium, *options, frame.as_uri()], capture_output=True, text=True, timeout=120)
        found = re.search(r"<title>(\d+)</title>", done.stdout)
        asked = set(re.findall(r'"initiator":"(?!not an origin)[^"]*"[^{}]*"url":"(https?://[^"]*)"', log.read_text()))
    return {"load_ms": int(found[1]) if found else None, "asks": sorted(asked)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="a folder for runs and pages that stays")
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp())
    write_all(root, arguments.runs, arguments.steps)
    found: dict[str, Any] = {"runs": arguments.runs, "steps": arguments.steps}
    found["list_s"] = timed("runs", "runs", cwd=root)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    for name, place in (("many", "runs"), ("long", "long")):
        page = root / f"{name}.html"
        found[f"{name}_s"] = timed("report", place, f"output={page}", cwd=root)
        found[f"{name}_mb"] = round(page.stat().st_size / 1e6, 2)
        print(f"{page}: {found[f'{name}_s']} s, {found[f'{name}_mb']} MB", file=sys.stderr)
        if chromium:
            found[name] = loaded(page.absolute(), chromium)
    if not arguments.keep:
        shutil.rmtree(root)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
