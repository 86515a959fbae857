"""Is one exported file right at every size? Runs against their files of ONNX and AOTInductor, and the time of each.

    python scripts/bench_export.py runs/… --pictures data/caltech101

Pictures are real ones, resized to 150 sizes from the smallest that the net takes to 640 × 480; for AOTInductor, which
compiles for a minute and is left out by --formats, to 100. The difference is that of a logit, by the largest logit of
the same picture. Times are medians, on one thread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor

from spp_cls import build, export, portable
from spp_cls.data.device import normalise
from spp_cls.models import SpatialPyramidPool2d

SIZES = {"onnx": 150, "torch": 150, "aoti": 100}
TIMED = ((224, 224), (256, 341))  # height and width in px; the second is a whole picture of 4:3
LEVELS = (6, 3, 2, 1)


def sizes_between(smallest: int, number: int, seed: int) -> list[tuple[int, int]]:
    """Heights up to 480 px and widths up to 640, evenly; both ends come first."""
    chance = random.Random(seed)
    ends = [(smallest, smallest), (480, 640), (smallest, 640), (480, smallest)]
    drawn = [(chance.randint(smallest, 480), chance.randint(smallest, 640)) for _ in range(number)]
    return [*ends, *drawn][:number]


def pixels_of(path: Path, height: int, width: int) -> Tensor:
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized).transpose(2, 0, 1)[None].copy())


def seconds(function: Callable[[Tensor], Any], pixels: Tensor, rounds: int) -> float:
    function(pixels)
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function(pixels)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def on_one_thread(file: Path) -> Callable[[Tensor], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels.numpy()})


def measure(path: str, formats: list[str], pictures: list[Path], rounds: int, seed: int) -> dict[str, Any]:
    run = build.load_run(path)
    classifier = build.load_classifier(run.checkpoint)
    about = export.about(run, classifier, *export.limits(classifier.net, None, 2048))

    def eager(pixels: Tensor) -> Tensor:
        logits: Tensor = classifier.net(normalise(pixels, about["mean"], about["std"]))
        return logits

    report: dict[str, Any] = {"model": run.config["model"].get("name"), "smallest": about["smallest_size"]}
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"net{portable.SUFFIXES[name]}"
            begin = time.perf_counter()
            agreement = portable.write(classifier.net, file, name, about)
            found = {"written_in_s": round(time.perf_counter() - begin, 1), "own_check": agreement.difference}
            program = portable.load(file, name)[0]
            shares = []
            for i, (height, width) in enumerate(sizes_between(about["smallest_size"], SIZES[name], seed)):
                pixels = pixels_of(pictures[i % len(pictures)], height, width)
                expected = eager(pixels)
                shares.append(float((program(pixels)[0] - expected).abs().max() / expected.abs().max()))
            found |= {"sizes": len(shares), "difference": max(shares), "mb": round(file.stat().st_size / 1e6, 1)}
            timed = on_one_thread(file) if name == "onnx" else program
            for height, width in TIMED:
                pixels = pixels_of(pictures[0], height, width)
                ours, theirs = (seconds(function, pixels, rounds) for function in (eager, timed))
                found[f"ms_{height}x{width}"] = {"eager": round(1000 * ours, 2), name: round(1000 * theirs, 2)}
            report[name] = found
            print(f"{report['model']}, {name}: {found}", flush=True)
    return report


def pyramid_alone(number: int, seed: int) -> float:
    """The largest difference of the pyramid {6,3,2,1} through ONNX on maps of 1 × 1 to 60 × 60 cells."""
    layer = SpatialPyramidPool2d(LEVELS)
    free = {dim: torch.export.Dim.AUTO for dim in (0, 2, 3)}
    program = torch.export.export(layer, (torch.randn(2, 8, 13, 15),), dynamic_shapes=(free,))
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["maps"])
    assert made is not None
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    chance, worst = random.Random(seed), 0.0
    small = [(h, w) for h in range(1, 8) for w in range(1, 8)]
    for h, w in [*small, *((chance.randint(1, 60), chance.randint(1, 60)) for _ in range(number))][:number]:
        maps = torch.randn(1, 8, h, w)
        worst = max(worst, float(np.abs(session.run(None, {"maps": maps.numpy()})[0] - layer(maps).numpy()).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders of spp train")
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--formats", nargs="+", choices=list(SIZES), default=["onnx", "aoti"])
    parser.add_argument("--rounds", type=int, default=20, help="of each time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pictures = sorted(arguments.pictures.glob("**/*.jpg"))
    if not pictures:
        parser.error(f"--pictures={arguments.pictures}: no files *.jpg below it")
    random.Random(arguments.seed).shuffle(pictures)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what AOTInductor compiles
    torch.set_num_threads(1)
    with torch.inference_mode():
        report = {
            "script": "bench_export",
            "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
            "machine": platform.machine(),
            "pyramid_alone": pyramid_alone(150, arguments.seed),
            "runs": [
                measure(run, arguments.formats, pictures[:500], arguments.rounds, arguments.seed)
                for run in arguments.runs
            ],
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
