"""The ways to test beside each other, by CPU time and, of a run, errors: maps against crops, 96 + 2 views against 10.

    python scripts/bench_views.py                                  # ZF-5 with random weights: time alone
    python scripts/bench_views.py --run RUN [--split val]          # a run, on its own pictures
    python scripts/bench_views.py --views ten_crop ten_crop_maps --rounds 5

In each round all ways are run in turn, on one thread; the first round, in which memory is found, does not count, and
given are medians of the others' process CPU time. Without a run it is the time from decoded pictures to mean scores,
with a run that of the whole test, with reading. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spp_cls import build
from spp_cls.classifier import Classifier
from spp_cls.data import Views
from spp_cls.data.datamodule import IMAGENET_MEAN, IMAGENET_STD
from spp_cls.data.device import normalise
from spp_cls.data.source import take_views
from spp_cls.data.views import PROTOCOLS
from spp_cls.evaluate import errors, evaluate
from spp_cls.models import sppnet
from spp_cls.schedules import constant

WAYS = ("ten_crop", "ten_crop_maps", "multi_scale_full", "multi_scale_pixels")
AGAINST = "ten_crop"  # what the others are compared with
PICTURE = (375, 500)  # height and width in px of most of ImageNet's

Tests = dict[str, Callable[[], dict[str, float]]]  # a way to test → what it finds


def in_turn(tests: Tests, rounds: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds of CPU time of each way, medians of the rounds, and what each found."""
    seconds: dict[str, list[float]] = {name: [] for name in tests}
    found = {}
    for number in range(rounds + 1):
        for name, test in tests.items():
            began = time.process_time()
            found[name] = test()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}, found


def of_random_weights(ways: list[str], images: int) -> Tests:
    net = sppnet("zf5", 1000, norm="within_channel")
    classifier = Classifier(net=net, optimizer=torch.optim.SGD, schedule=constant).eval()
    pictures = torch.randint(0, 256, (images, 3, *PICTURE), dtype=torch.uint8)

    @torch.inference_mode()
    def test(way: str) -> dict[str, float]:
        scores: list[Tensor] = []
        for one in PROTOCOLS[way]:
            taken = [take_views(picture, one, 224, 256, 224) for picture in pictures]
            views = torch.stack([views.permute(0, 2, 3, 1) for views, _ in taken]).movedim(-1, -3)
            scores.append(classifier.scores_of_views(normalise(views, IMAGENET_MEAN, IMAGENET_STD), taken[0][1]))
        torch.cat(scores, 1).mean(1)
        return {}

    return {way: lambda way=way: test(way) for way in ways}  # type: ignore[misc]


def of_a_run(ways: list[str], path: str, split: str, root: str | None) -> tuple[Tests, int]:
    """The tests, and the number of pictures."""
    from lightning import Trainer

    build.quieten()
    run = build.load_run(path)
    classifier = build.load_classifier(run.checkpoint)
    datamodule = build.restore_datamodule(run, classifier, root)
    datamodule.num_workers = 0  # whose time would not be this process's
    for way in ways:
        Views(way).check(classifier.net)
    assert datamodule.index is not None

    def test(way: str) -> dict[str, float]:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        _, labels, scores = evaluate(classifier, datamodule, trainer, Views(way), split)
        return errors(labels, scores)

    return {way: lambda way=way: test(way) for way in ways}, len(datamodule.index.rows(split))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run folder or a checkpoint in one")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--root", help="where the run's pictures are, if they have moved")
    parser.add_argument("--views", nargs="+", default=list(WAYS), choices=list(PROTOCOLS))
    parser.add_argument("--images", type=int, default=2, help="pictures at once, without a run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways, images = list(dict.fromkeys([AGAINST, *arguments.views])), arguments.images
    if arguments.run:
        tests, images = of_a_run(ways, arguments.run, arguments.split, arguments.root)
    else:
        tests = of_random_weights(ways, images)
    seconds, found = in_turn(tests, arguments.rounds)
    rows: list[dict[str, Any]] = []
    for way in ways:
        row: dict[str, Any] = {
            "views": way,
            "number": Views(way).num_views,
            "ms a picture": round(1000 * seconds[way] / images, 2),
            f"time of {AGAINST}": round(seconds[way] / seconds[AGAINST], 3),
        }
        for name, value in found[way].items():
            row[name] = round(value, 3)
            row[f"{name} less {AGAINST}'s"] = round(value - found[AGAINST][name], 3)
        rows.append(row)
        print(*(f"{name}={value}" for name, value in row.items()), sep="  ", flush=True)
    about = {"script": "bench_views", "torch": torch.__version__, "rounds": arguments.rounds}
    print(json.dumps({**about, "run": arguments.run, "pictures": images, "rows": rows}))


if __name__ == "__main__":
    main()
