"""What dashboards show of a run beside numbers: pictures and the confusion matrix, kept in the run's folder `media/`.

first_batch.jpg  the first training batch as it arrived at the net      confusion.npz  label × answer, counts (K, K)
test/ROW.jpg     pictures of the test, small                            test.json      per class, and which these are
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .data.device import Mean, normalise, resize
from .data.index import Index
from .data.reader import read_rgb
from .whole import write_json, written_whole

MEDIA = "media"  # a folder of the run
LARGEST = 224  # px of the longer side of a picture that is kept
TILES = 64  # of the first batch, at most
WIDTH = 1400  # px of a grid, about
CAPTION = 30  # px below a picture in a grid, for two lines

Row = dict[str, Any]
Counts = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]  # (h, w, 3)


@dataclass(frozen=True)
class LastTest:
    """What is shown of the test at the end of a run."""

    folder: Path  # of the run
    classes: list[str]
    per_class: list[Row]  # as in evaluate.per_class
    pictures: list[Row]  # kind (mistake or random), row in the index, path, label, answer and their probabilities
    matrix: Counts  # (K, K): row is the label, column the answer

    def some(self, number: int) -> list[Row]:
        """At most `number` of the pictures: half of them mistakes, the most confident first, the others by chance."""
        of_kinds = {kind: [each for each in self.pictures if each["kind"] == kind] for kind in KINDS}
        return [*of_kinds["mistake"][: number // 2], *of_kinds["random"][: number - number // 2]]

    def file(self, picture: Row) -> Path:
        """Where the picture lies, as a small JPEG."""
        return self.folder / MEDIA / "test" / f"{int(picture['row'])}.jpg"


KINDS = ("mistake", "random")


# Keeping


def keep_first_batch(folder: Path, images: Tensor, mean: Mean, std: Sequence[float]) -> None:
    """Keep what arrived at the net, (B, 3, H, W) normalised, as one picture of all of them."""
    images = images[:TILES].detach().float()
    nothing = normalise(torch.zeros_like(images), mean, std)  # which pixels of 0 would be, also by a mean image
    scale = torch.tensor(tuple(std), device=images.device)[:, None, None]
    pixels = ((images - nothing) * scale).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    _save(folder / MEDIA / "first_batch.jpg", grid(list(pixels)))


def first_batch(folder: Path) -> Path | None:
    """Where the picture of the first batch lies, if it was kept."""
    path = folder / MEDIA / "first_batch.jpg"
    return path if path.is_file() and not path.is_symlink() else None


def choose(labels: Counts, scores: npt.NDArray[np.float32], number: int) -> dict[str, Counts]:
    """Kind → positions of at most `number` images: half of them mistakes, the most confident first, others by chance.

    `labels` (n,), `scores` (n, K).
    """
    answers, sure = scores.argmax(1), scores.max(1)
    wrong = np.flatnonzero(answers != labels)
    mistakes = wrong[np.argsort(-sure[wrong], kind="stable")][: number // 2]
    others = np.setdiff1d(np.arange(len(labels)), mistakes)
    chance = np.random.default_rng(0).permutation(others)  # the same for every run of these pictures, as far as it goes
    return {"mistake": mistakes, "random": np.sort(chance[: number - number // 2])}


def keep_test(
    folder: Path,
    index: Index,
    rows: Counts,
    labels: Counts,
    scores: npt.NDArray[np.float32],
    matrix: Counts,
    per_class: list[Row],
    number: int,
    step: int,
) -> None:
    """Keep of the test that ended a run at `step` its tables, and `number` of its pictures: see `choose`.

    `rows` (n,) in the index, `labels` (n,), `scores` (n, K).
    """
    here = folder / MEDIA
    (here / "test.json").unlink(missing_ok=True)  # which is written last: without it nothing is shown
    shutil.rmtree(here / "test", ignore_errors=True)
    (here / "test").mkdir(parents=True)
    pictures = []
    for kind, positions in choose(labels, scores, number).items():
        for i in positions.tolist():
            row, label, answer = int(rows[i]), int(labels[i]), int(scores[i].argmax())
            _save(here / "test" / f"{row}.jpg", _small(read_rgb(index.path(row), known=index.known(row))))
            pictures.append(
                {
                    "kind": kind,
                    "row": row,
                    "path": index.paths[row],
                    "label": index.classes[label],
                    "answer": index.classes[answer],
                    "probability": round(float(scores[i, answer]), 4),
                    "probability_of_label": round(float(scores[i, label]), 4),
                }
            )
    np.savez_compressed(here / "confusion.npz", matrix=matrix)
    about = {"step": step, "classes": list(index.classes), "per_class": per_class, "pictures": pictures}
    write_json(here / "test.json", about)


def read_test(folder: Path, step: int) -> LastTest | None:
    """What is kept of the test of the run of `folder` after `step`, its last; None where there is nothing of it."""
    here = folder / MEDIA
    try:
        about = json.loads((here / "test.json").read_text(encoding="utf-8"))
        if about["step"] != step:
            return None
        with np.load(here / "confusion.npz") as arrays:
            found = LastTest(folder, about["classes"], about["per_class"], about["pictures"], arrays["matrix"])
        kept = [each for each in found.pictures if found.file(each).is_file() and not found.file(each).is_symlink()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return LastTest(folder, found.classes, found.per_class, kept, found.matrix)


def _small(image: Tensor) -> Pixels:
    """(3, h, w) → (h', w', 3), no side longer than `LARGEST`."""
    scale = min(1.0, LARGEST / max(image.shape[1:]))
    height, width = (max(1, round(side * scale)) for side in image.shape[1:])
    pixels: Pixels = resize(image[None], (height, width))[0].permute(1, 2, 0).numpy()
    return pixels


def _save(path: Path, pixels: Pixels) -> None:
    with written_whole(path) as beside:
        Image.fromarray(pixels).save(beside, "JPEG", quality=90)


# Drawing


def grid(tiles: Sequence[Pixels], captions: Sequence[str] = ()) -> Pixels:
    """Pictures of any shape in rows, about `WIDTH` px wide, each with its caption of one or two lines below."""
    height, width = (max(tile.shape[i] for tile in tiles) for i in range(2))
    across = max(1, min(len(tiles), WIDTH // width, math.ceil(math.sqrt(len(tiles)))))
    high = height + (CAPTION if captions else 0)
    out = Image.new("RGB", (across * width, -(-len(tiles) // across) * high), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(11)
    for i, tile in enumerate(tiles):
        left, top = i % across * width, i // across * high
        out.paste(Image.fromarray(tile), (left, top))
        if captions:
            lines = "\n".join(line[: max(4, width // 6)] for line in captions[i].split("\n"))  # 6 px a letter
            draw.multiline_text((left + 2, top + height + 1), lines, "black", font, spacing=1)
    return np.asarray(out)


def draw_confusion(matrix: Counts, classes: Sequence[str]) -> Pixels:
    """A picture: rows are labels, columns answers, shade the share of the row; blue is right, red is wrong."""
    cell = max(1, min(22, 1000 // len(classes)))
    shares = (matrix / np.maximum(1, matrix.sum(1, keepdims=True)))[..., None]
    right = np.eye(len(classes), dtype=bool)[..., None]
    colours = np.where(right, (33, 102, 172), (178, 24, 43))
    cells: Pixels = np.rint(255 + shares * (colours - 255)).astype(np.uint8)
    pixels = cells.repeat(cell, 0).repeat(cell, 1)
    if cell < 9:  # no name would fit
        return pixels
    font = ImageFont.load_default(min(12, cell))
    margin = 6 + int(max(font.getlength(name) for name in classes))
    out = Image.new("RGB", (margin + pixels.shape[1], margin + pixels.shape[0]), "white")
    out.paste(Image.fromarray(pixels), (margin, margin))
    middles = [margin + cell * (i + 0.5) for i in range(len(classes))]
    draw = ImageDraw.Draw(out)
    for name, middle in zip(classes, middles, strict=True):
        draw.text((margin - 4, middle), name, "black", font, anchor="rm")
    out = out.transpose(Image.Transpose.ROTATE_270)  # the names of the columns stand at the right now
    draw = ImageDraw.Draw(out)
    for name, middle in zip(classes, middles, strict=True):
        draw.text((out.width - margin + 4, middle), name, "black", font, anchor="lm")
    return np.asarray(out.transpose(Image.Transpose.ROTATE_90))


def draw_mistakes(tested: LastTest, number: int) -> Pixels | None:
    """Of `number` pictures the mistakes, with label, answer and its probability; None where there are none."""
    wrong = [each for each in tested.some(number) if each["kind"] == "mistake"]
    if not wrong:
        return None
    tiles = [np.asarray(Image.open(tested.file(each)).convert("RGB")) for each in wrong]
    return grid(tiles, [f"is {each['label']}\nsaid {each['answer']}, {each['probability']:.2f}" for each in wrong])


def encoded(pixels: Pixels, kind: str = "PNG") -> bytes:
    """`pixels` as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
