"""Show that `data=shapes` cannot be solved without shape and place: two kinds of classifiers that see neither.

A colour histogram (8 x 8 x 8 bins of RGB), classified by its nearest neighbours and by a linear model, and a linear
model on thumbnails of 32 x 32 px. Both linear models get the weight decay that is best on val; errors are on test.

    python scripts/shapes_baselines.py data/shapes        # about a minute; prints one line of JSON at the end
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spp_cls.data.shapes import CLASSES, make_shapes

WEIGHT_DECAYS = [10.0**exponent for exponent in range(-6, 2)]
NEIGHBOURS = [1, 3, 5, 9, 17, 33]


def main(root: Path) -> None:
    make_shapes(root)
    splits = {split: read(root / split) for split in ("train", "val", "test")}
    labels = {split: labels for split, (_, _, labels) in splits.items()}
    histograms = {split: histograms for split, (histograms, _, _) in splits.items()}
    thumbnails = {split: thumbnails for split, (_, thumbnails, _) in splits.items()}
    answer = {
        "n_train": len(labels["train"]),
        "n_test": len(labels["test"]),
        "histogram_neighbours_error": neighbours(histograms, labels),
        "histogram_linear_error": linear(histograms, labels),
        "thumbnail_linear_error": linear(thumbnails, labels),
        "chance_error": round(100 - 100 / len(CLASSES), 2),
    }
    print(json.dumps(answer))


def read(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return the histograms (n, 512), their sums 1, the thumbnails (n, 3072) in [0, 1], and the labels (n,)."""
    histograms, thumbnails, labels = [], [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.jpg")):
            with Image.open(path) as image:
                bins = np.asarray(image).reshape(-1, 3) // 32 @ [64, 8, 1]
                thumbnails.append(np.asarray(image.resize((32, 32), Image.Resampling.BOX)).ravel() / 255)
            histograms.append(np.bincount(bins, minlength=512) / len(bins))
            labels.append(label)
    return (
        torch.from_numpy(np.stack(histograms)).float(),
        torch.from_numpy(np.stack(thumbnails)).float(),
        torch.tensor(labels),
    )


def neighbours(features: dict[str, Tensor], labels: dict[str, Tensor]) -> float:
    """Return the error in percent of the vote of the k nearest training pictures (city-block distance)."""

    def error(split: str, k: int) -> float:
        nearest = torch.cdist(features[split], features["train"], p=1).topk(k, largest=False).indices
        votes = torch.nn.functional.one_hot(labels["train"][nearest], len(CLASSES)).sum(dim=1)
        return percent(votes.argmax(dim=1) != labels[split])

    best = min(NEIGHBOURS, key=lambda k: error("val", k))
    return error("test", best)


def linear(features: dict[str, Tensor], labels: dict[str, Tensor]) -> float:
    """Return the error in percent of multinomial logistic regression on standardised features."""
    std, mean = torch.std_mean(features["train"], dim=0)
    inputs = {split: (x - mean) / (std + 1e-6) for split, x in features.items()}

    def errors(weight_decay: float) -> tuple[float, float]:
        weight = torch.zeros(inputs["train"].shape[1], len(CLASSES), requires_grad=True)
        bias = torch.zeros(len(CLASSES), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(inputs["train"] @ weight + bias, labels["train"])
            value = value + weight_decay / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        val, test = (percent((inputs[s] @ weight + bias).argmax(1) != labels[s]) for s in ("val", "test"))
        return val, test

    return min((errors(weight_decay) for weight_decay in WEIGHT_DECAYS), key=lambda pair: pair[0])[1]


def percent(wrong: Tensor) -> float:
    return round(100 * wrong.float().mean().item(), 2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/shapes_baselines.py FOLDER")
    main(Path(sys.argv[1]))
