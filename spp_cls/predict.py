"""`spp predict`: class and probability of pictures, by a run alone; its training pictures need not be there."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from omegaconf import DictConfig

from .door import check_file, check_number, names_apart, open_door, quoted
from .whole import written_whole
from .words import printable

if TYPE_CHECKING:
    from .classifier import Classifier
    from .data import Views


@dataclass(frozen=True)
class Prediction:
    """The best classes of one picture with their probabilities, best first; or why it could not be read."""

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def predict(classifier: Classifier, paths: list[Path], views: Views, top: int = 5) -> Iterator[Prediction]:
    """A `Prediction` for each picture, in order."""
    import torch

    from .data.device import normalise
    from .data.source import read_views

    known = classifier.identity
    with torch.inference_mode():
        for path in paths:
            try:
                passes = read_views(path, views, known["resize"], known["region"])
            except ValueError as error:
                yield Prediction(path, error=str(error))
                continue
            scores = []  # of each pass (1, V, K)
            for pixels, windows in passes:
                images = normalise(pixels[None].to(classifier.device), known["mean"], known["std"])  # (1, V, 3, h, w)
                where = None if windows is None else windows.to(classifier.device)
                scores.append(classifier.scores_of_views(images, where))
            best = torch.cat(scores, 1).mean(1)[0].topk(min(top, len(known["classes"])))
            names = tuple(known["classes"][k] for k in best.indices.tolist())
            yield Prediction(path, names, tuple(best.values.tolist()))


def pictures(paths: list[str]) -> list[Path]:
    """The files that `paths` name; of a folder all pictures in it and below."""
    from .data.layouts import SUFFIXES, is_left_behind

    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(
                path
                for path in given.rglob("*")
                if path.name.lower().endswith(SUFFIXES)
                and (path.is_file() or (path.is_symlink() and not path.exists()))  # a broken link is named when read
                and not any(map(is_left_behind, path.relative_to(given).parts))
            )
            if not inside:
                raise ValueError(f"{given}: no pictures in this folder")
            found += inside
        elif given.is_file():
            found.append(given)
        else:
            raise ValueError(f"{given} does not exist; name pictures or folders of pictures")
    return found


def write(predictions: Iterator[Prediction], format: str, file: TextIO) -> int:
    """Write them as `table`, `csv` or `jsonl`; gives how many pictures could not be read."""
    if format not in ("table", "csv", "jsonl"):
        raise ValueError(f"format={format}: use table, csv or jsonl")
    bad = 0
    writer = csv.writer(file)
    if format == "csv":
        writer.writerow(["path", "class", "probability", "top"])
    for p in predictions:
        if p.error:
            bad += 1
            print(f"spp predict: {p.error}", file=sys.stderr)
            continue
        top = dict(zip(p.classes, (round(x, 6) for x in p.probabilities), strict=True))
        if format == "csv":
            writer.writerow([p.path, p.classes[0], f"{p.probabilities[0]:.6f}", json.dumps(top)])
        elif format == "jsonl":
            row: dict[str, Any] = {
                "path": str(p.path),
                "class": p.classes[0],
                "probability": p.probabilities[0],
            }
            file.write(json.dumps({**row, "top": top}) + "\n")
        else:
            rest = "  ".join(f"{name} {x:.1%}" for name, x in list(zip(p.classes, p.probabilities, strict=True))[1:])
            file.write(printable(f"{p.path}  {p.classes[0]} {p.probabilities[0]:.1%}   ({rest})") + "\n")
    return bad


def run(config: DictConfig) -> None:
    """Everything that `spp predict` does with a config."""
    import torch

    from . import build
    from .cost import check_shapes
    from .data import Views

    check_number("top", config.top)
    check_file("output", config.output)
    if not config.paths:
        raise ValueError("no pictures named; give paths of pictures or folders, like spp predict run=… a.jpg b.png")
    paths = pictures(list(config.paths))
    views = build.instantiate(config.views, "views")
    run = build.load_run(config.run, config.ckpt, config.trust)
    classifier = build.load_classifier(run.checkpoint, config.trust)
    known = classifier.identity
    views = Views(views.crops, views.size or known["region"])
    views.check(classifier.net)
    least = views.smallest_side(known["resize"], known["region"])
    check_shapes(classifier.net, [("views.size", (least, least))])
    if config.device == "auto":
        classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            classifier.to(config.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={config.device}: {str(error).splitlines()[0]}; use auto or cpu") from error
    predictions = predict(classifier, paths, views, config.top)
    if config.output:
        with (
            written_whole(Path(config.output)) as beside,
            beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            bad = write(predictions, config.format, file)
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # names of files need be no text
        bad = write(predictions, config.format, sys.stdout)
    if bad:
        raise ValueError(f"{bad} of {len(paths)} pictures could not be read; they are named above")


def main(arguments: list[str] | None = None) -> None:
    """The door; words that name a picture or are no key=value are paths."""
    paths, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    named = [f"paths=[{','.join(map(quoted, paths))}]"] if paths else []
    open_door("predict", run, [*others, *named])


if __name__ == "__main__":
    main()
