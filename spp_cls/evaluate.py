"""`spp evaluate`: test one run, or several averaged, on the pictures and the preprocessing of the run itself."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from .door import check_folder, open_door
from .results import errors
from .whole import write_json, write_whole, written_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import Trainer

    from .classifier import Classifier
    from .data import MultiSizeDataModule, Views
    from .run import Run

MATRIX = 200  # classes of a confusion matrix that can be read
Scores = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def evaluate(
    classifier: Classifier,
    datamodule: MultiSizeDataModule,
    trainer: Trainer,
    views: Views,
    split: str = "test",
) -> tuple[Labels, Labels, Scores]:
    """Rows in the index (n,), labels (n,) and class probabilities (n, K) of every image of `split`, once each."""
    datamodule.views, datamodule.test_split = datamodule.sized(views), split
    trainer.test(classifier, datamodule=datamodule, verbose=False)
    return scored(classifier)


def scored(classifier: Classifier) -> tuple[Labels, Labels, Scores]:
    """The same of the test that `classifier` made last."""
    rows = sorted(classifier.test_scores)
    labels = [classifier.test_scores[row][0] for row in rows]
    scores = [classifier.test_scores[row][1].numpy() for row in rows]
    return np.array(rows), np.array(labels), np.stack(scores)


def same_pictures(a: MultiSizeDataModule, b: MultiSizeDataModule, split: str) -> bool:
    """Whether `split` has the same pictures, labels and classes in both, so that scores can be averaged."""
    assert a.index is not None and b.index is not None
    rows_a, rows_b = a.index.rows(split), b.index.rows(split)
    return (
        a.classes == b.classes
        and a.index.paths.take(rows_a) == b.index.paths.take(rows_b)
        and np.array_equal(a.index.labels[rows_a], b.index.labels[rows_b])
    )


def confusion_matrix(labels: Labels, scores: Scores) -> Labels:
    """(K, K) counts: row is the label, column the answer."""
    matrix = np.zeros((scores.shape[1], scores.shape[1]), np.int64)
    np.add.at(matrix, (labels, scores.argmax(1)), 1)
    return matrix


def per_class(matrix: Labels, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class: images, top-1 error in percent, precision in percent, and the class it is taken for most."""
    rows = []
    for k, name in enumerate(classes):
        images, answered, right = int(matrix[k].sum()), int(matrix[:, k].sum()), int(matrix[k, k])
        wrong = matrix[k].copy()
        wrong[k] = 0
        rows.append(
            {
                "class": name,
                "images": images,
                "top1_error": round(100 * (1 - right / images), 2) if images else None,
                "precision": round(100 * right / answered, 2) if answered else None,
                "taken_for": classes[int(wrong.argmax())] if wrong.any() else None,
            }
        )
    return rows


@dataclass(frozen=True)
class Tested:
    """What came of a test: the images' rows in the index (n,), labels (n,) and class probabilities (n, K)."""

    run: Run
    datamodule: MultiSizeDataModule
    rows: Labels
    labels: Labels
    scores: Scores


def run(config: DictConfig) -> float:
    """Everything that `spp evaluate` does with a config; gives the top-1 error."""
    from . import build
    from .data import Views

    paths = [config.run] if isinstance(config.run, str) else list(config.run)
    views = build.instantiate(config.views, "views")
    assert isinstance(views, Views)
    check_folder("output", config.output)
    if config.batch_norm not in ("shared", "recalibrated"):
        raise ValueError(f"batch_norm={config.batch_norm}: use shared or recalibrated")
    tested: list[Tested] = []
    for each in [build.load_run(path, config.ckpt, config.trust) for path in paths]:
        tested.append(_test(each, views, config, tested[0] if tested else None))
        if len(paths) > 1:
            error = errors(tested[-1].labels, tested[-1].scores)["top1_error"]
            print(f"{each.folder}: top-1 error {error:.2f} %", file=sys.stderr)
    mean = np.stack([one.scores for one in tested]).mean(0, dtype=np.float64).astype(np.float32)
    size = tested[0].datamodule.sized(views).size
    name = f"{config.split}_{views.crops}_{size}" + ("_recalibrated" if config.batch_norm != "shared" else "")
    weights = tested[0].run.checkpoint.stem
    name += "" if weights == "last" else f"_{weights}"
    name += "_" + re.sub(r"[^-\w]+", "-", Path(config.root).name) if config.root else ""
    here = Path(HydraConfig.get().runtime.output_dir) if len(paths) > 1 else tested[0].run.folder / "evaluations" / name
    folder = Path(config.output) if config.output else here
    about = {"split": config.split, "views": views.crops, "size": size, "batch_norm": config.batch_norm}
    found = errors(tested[0].labels, mean)
    _write(folder, tested, mean, {**about, "images": len(mean), **found})
    top5 = f", top-5 {found['top5_error']:.2f} %" if mean.shape[1] > 5 else ""  # else every answer is among five
    print(
        f"{config.split} error of {len(mean)} images ({views.crops}, {size} px"
        f"{f', {len(paths)} nets averaged' if len(paths) > 1 else ''}): "
        f"top-1 {found['top1_error']:.2f} %{top5}\nall of it: {folder}"
    )
    return found["top1_error"]


def _test(run: Run, views: Views, config: DictConfig, first: Tested | None) -> Tested:
    """The test of one run; raises ValueError where its pictures are not those of the `first` one."""
    from . import build
    from .cost import check_shapes
    from .recalibrate import recalibrate

    classifier = build.load_classifier(run.checkpoint, config.trust)
    views.check(classifier.net)
    datamodule = build.restore_datamodule(run, classifier, config.root)
    if config.batch_size:
        datamodule.batch_size = config.batch_size
    if config.num_workers is not None:
        datamodule.num_workers = config.num_workers
    least = datamodule.sized(views).smallest_side(datamodule.resize, datamodule.region)
    check_shapes(classifier.net, [("views.size", (least, least))])
    if first is not None and not same_pictures(first.datamodule, datamodule, config.split):
        raise ValueError(f"run={run.folder}: its {config.split} pictures are not those of {first.run.folder}")
    assert datamodule.index is not None
    if not len(datamodule.index.rows(config.split)):
        raise ValueError(f"split={config.split}: {datamodule.root} has no such pictures")
    if config.batch_norm == "recalibrated":
        size = datamodule.sized(views).size
        assert size is not None
        recalibrate(classifier.net, datamodule, size, config.recalibration_images)
    trainer = build.build_trainer(config, None)
    return Tested(run, datamodule, *evaluate(classifier, datamodule, trainer, views, config.split))


def _write(folder: Path, tested: Sequence[Tested], mean: Scores, results: dict[str, Any]) -> None:
    """What `spp evaluate` leaves in `folder`, of class probabilities (n, K) averaged over the runs."""
    first = tested[0]
    labels, classes = first.labels, first.datamodule.classes
    matrix = confusion_matrix(labels, mean)
    assert first.datamodule.index is not None
    paths = np.array(first.datamodule.index.paths.take(first.rows))
    counts = [dict(zip(classes, row, strict=True)) for row in matrix.tolist()]
    confusions = [{"label": name, **row} for name, row in zip(classes, counts, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "per_class.csv", per_class(matrix, classes))
    _write_csv(folder / "confusion_matrix.csv", confusions)
    if len(classes) <= MATRIX:
        drawn = draw_confusion_matrix(matrix, classes)
        write_whole(folder / "confusion_matrix.svg", drawn.encode(errors="backslashreplace").decode())
    with written_whole(folder / "scores.npz", ".npz") as beside:
        np.savez(beside, paths=paths, labels=labels, scores=mean, classes=np.array(classes))
    runs = {
        "runs": [str(one.run.folder) for one in tested],
        "checkpoints": [one.run.checkpoint.name for one in tested],
    }
    write_json(folder / "results.json", {**runs, **results})


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with (
        written_whole(path) as beside,
        beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,  # names need be no text
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_confusion_matrix(matrix: Labels, classes: Sequence[str]) -> str:
    """An SVG: rows are labels, columns answers, shade the share of the row; a cell tells its count when pointed at."""
    from html import escape

    cell = 22 if len(classes) <= 40 else 9
    margin = 8 + 7 * max(len(name) for name in classes)
    side = margin + cell * len(classes) + 20
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" font-family="sans-serif" '
        f'font-size="{min(12, cell)}"><rect width="100%" height="100%" fill="white"/>'
    ]
    for i, name in enumerate(classes):
        at = margin + cell * (i + 0.75)
        text = escape(name)
        parts.append(f'<text x="{margin - 5}" y="{at:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<text transform="translate({at:.1f} {margin - 5}) rotate(-90)">{text}</text>')
        for j, other in enumerate(classes):
            colour = "#2166ac" if i == j else "#b2182b"
            parts.append(
                f'<rect x="{margin + cell * j}" y="{margin + cell * i}" width="{cell}" height="{cell}" '
                f'fill="{colour}" fill-opacity="{shares[i, j]:.3f}" stroke="#ddd" stroke-width="0.5">'
                f"<title>{text} → {escape(other)}: {matrix[i, j]}</title></rect>"
            )
    return "\n".join([*parts, "</svg>\n"])


def main(arguments: list[str] | None = None) -> None:
    """The door."""
    open_door("evaluate", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
