"""`data=shapes`: a data set that draws itself, in which shape, place and scale decide the class.

Every picture shows two things, each a disc, a triangle or a square, one in its upper and one in its lower half. The
class says which is above; where both have the same shape, it says whether the bigger one is above. Sizes, colours,
textures and strokes are noise. No class changes under a left-right flip, and every 224 px region of a picture whose
shorter side is 256 px keeps most of both things.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

VERSION = 1  # of the drawing: raise it whenever the same seed gives other pictures

SHAPES = ("disc", "triangle", "square")
CLASSES: tuple[str, ...] = tuple(
    sorted(
        [f"{upper}_over_{lower}" for upper in SHAPES for lower in SHAPES if upper != lower]
        + [f"{order}_{shape}" for order in ("big_over_small", "small_over_big") for shape in SHAPES]
    )
)

SHORTER_SIDE = (144, 320)  # px
ASPECT = (9 / 10, 4 / 3)  # width / height
DIAMETER = (0.11, 0.24)  # of the disc of the same area; unit: the shorter side
RATIO = 1.75  # at least, between the diameters of two things of one shape
CONTRAST = 60  # at least, in brightness (0 to 255), between the ground and each thing
GAP = 0.2  # at least, between the box above and the box below; unit: the shorter side
KEPT = 0.75  # at least, of the area of each box, inside every region of `REGION`
REGION = 224 / 256  # unit: the shorter side

SETTINGS = "shapes.json"  # the settings of a finished set, written last

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Thing:
    """A filled polygon, `corners` (n, 2) as x, y in px; `diameter` in px is that of a disc as large."""

    shape: str
    diameter: float
    corners: Floats

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in px."""
        left, top = self.corners.min(axis=0).tolist()
        right, bottom = self.corners.max(axis=0).tolist()
        return left, top, right, bottom


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its size in px and its two things."""

    width: int
    height: int
    upper: Thing
    lower: Thing


def draw(label: int, rng: np.random.Generator) -> Image.Image:
    """Draw one picture of class `CLASSES[label]`."""
    return paint(compose(label, rng), rng)


def compose(label: int, rng: np.random.Generator) -> Scene:
    """Choose the size of a picture of class `CLASSES[label]`, its two things and their places."""
    while True:
        shorter = math.exp(rng.uniform(*np.log(SHORTER_SIDE)))
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        width, height = round(shorter * max(aspect, 1)), round(shorter * max(1 / aspect, 1))
        upper, lower = _things(label, min(width, height), rng)
        places = rng.uniform((0, 0), (width, height / 2), (64, 2, 2))  # of two centres, proposed 64 times
        places[:, 1, 1] += height / 2
        low = places + [upper.corners.min(axis=0), lower.corners.min(axis=0)]
        high = places + [upper.corners.max(axis=0), lower.corners.max(axis=0)]
        good = (kept(low, high, width, height) >= KEPT).all(axis=1)
        good &= (high[:, 0, 1] <= height / 2) & (low[:, 1, 1] >= height / 2)
        good &= low[:, 1, 1] - high[:, 0, 1] >= GAP * min(width, height)
        good &= (low >= 0).all(axis=(1, 2)) & (high <= (width, height)).all(axis=(1, 2))
        if good.any():
            above, below = places[good.argmax()]
            return Scene(width, height, _moved(upper, above), _moved(lower, below))


def kept(low: Floats, high: Floats, width: int, height: int) -> Floats:
    """Return the part of each box, by area, that is left in the region of `REGION` which shows least of it.

    `low` and `high` are (..., 2): left, top and right, bottom in px of a picture of `width` x `height`.
    """
    size = np.array([width, height])
    region = REGION * size.min()
    # What a moving region shows of an interval rises, stays, then falls: the least is at one of the ends.
    first = np.minimum(high, region) - low
    last = high - np.maximum(low, size - region)
    least: Floats = (np.minimum(first, last).clip(0) / (high - low)).prod(axis=-1)
    return least


def paint(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Paint a scene in colours, textures and strokes of chance."""
    size = scene.width, scene.height
    ground, *colours = _colours(rng)
    image = _texture(size, ground, rng)
    image.paste(_texture(size, rng.uniform(40, 215, 3), rng), mask=_strokes(size, rng))
    for thing, colour in zip((scene.upper, scene.lower), colours, strict=True):
        left, top, right, bottom = thing.box
        corner = math.floor(left), math.floor(top)
        size = math.ceil(right) - corner[0], math.ceil(bottom) - corner[1]
        mask = Image.new("L", (4 * size[0], 4 * size[1]))
        ImageDraw.Draw(mask).polygon([(4 * x, 4 * y) for x, y in thing.corners - corner], fill=255)
        image.paste(_texture(size, colour, rng), corner, mask.reduce(4))
    return image


def _things(label: int, size: int, rng: np.random.Generator) -> tuple[Thing, Thing]:
    """Return the upper and the lower thing of a class, both with their centre at 0, 0."""
    above, below = CLASSES[label].split("_over_")
    if above in SHAPES:
        shapes, diameters = (above, below), rng.uniform(*DIAMETER, 2)
    else:  # "big", "small_disc" or "small", "big_disc"
        shapes = (below.split("_")[1],) * 2
        small = rng.uniform(DIAMETER[0], DIAMETER[1] / RATIO)
        big = rng.uniform(small * RATIO, DIAMETER[1])
        diameters = np.array([big, small] if above == "big" else [small, big])
    upper, lower = (_thing(shape, diameter * size, rng) for shape, diameter in zip(shapes, diameters, strict=True))
    return upper, lower


def _thing(shape: str, diameter: float, rng: np.random.Generator) -> Thing:
    """Return a thing with its centre at 0, 0, turned by up to 15 degrees."""
    n = {"disc": 72, "triangle": 3, "square": 4}[shape]
    start = {"disc": 0.0, "triangle": -math.pi / 2, "square": -math.pi / 4}[shape]
    angles = start + rng.uniform(-math.pi / 12, math.pi / 12) + np.arange(n) * 2 * math.pi / n
    # A regular n-gon of radius r has the area n/2 r² sin(2π/n).
    radius = diameter / 2 * math.sqrt(2 * math.pi / n / math.sin(2 * math.pi / n))
    return Thing(shape, diameter, radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _moved(thing: Thing, by: Floats) -> Thing:
    return Thing(thing.shape, thing.diameter, thing.corners + by)


def _colours(rng: np.random.Generator) -> Floats:
    """Return the colours (3, 3) of the ground and of two things that both stand out from it in brightness."""
    while True:
        colours = rng.uniform(20, 235, (3, 3))
        colours[0] += 0.5 * (colours[0].mean() - colours[0])  # a ground of softer colour
        brightness = colours @ [0.299, 0.587, 0.114]
        if (abs(brightness[1:] - brightness[0]) >= CONTRAST).all():
            return colours


def _texture(size: tuple[int, int], colour: Floats, rng: np.random.Generator) -> Image.Image:
    """Return a picture of one colour with soft spots, coarse and fine."""
    cells = int(rng.integers(8, 24))
    coarse = (colour + rng.normal(0, 14, (3, 3, 3))).clip(0, 255).astype(np.uint8)
    wash = np.asarray(Image.fromarray(coarse).resize((cells, cells), Image.Resampling.BICUBIC))
    spots = (wash + rng.normal(0, rng.uniform(0, 8), wash.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC)


def _strokes(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return a mask of a few thin curves, each through three points of chance."""
    mask = Image.new("L", (2 * size[0], 2 * size[1]))
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(rng.integers(1, 5)):
        start, middle, end = rng.uniform(-0.2, 1.2, (3, 2)) * mask.size
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        width = max(2, round(rng.uniform(0.005, 0.02) * min(mask.size)))
        shade = int(rng.integers(90, 256))
        ImageDraw.Draw(mask).line([(x, y) for x, y in curve], fill=shade, width=width, joint="curve")
    return mask.reduce(2)


def make_shapes(
    root: Path,
    *,
    train_per_class: int = 150,
    val_per_class: int = 20,
    test_per_class: int = 50,
    seed: int = 0,
) -> None:
    """Draw the data set into `root/{train,val,test}/<class>/<NNNN>.jpg`, about 2 ms a picture.

    Each picture depends on (seed, split, class, number) alone. The set is drawn beside `root` and renamed, so
    that it is there whole or not at all, and two processes may draw it at once. A finished set of the same
    settings is left as it is; anything else in `root` is a ValueError.
    """
    counts = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
    if seed < 0 or min(counts.values()) < 1:
        raise ValueError(f"seed={seed} must be at least 0, the pictures per class at least 1: {counts}")
    settings = {"version": VERSION, "seed": seed} | {f"{name}_per_class": n for name, n in counts.items()}
    if _is_finished(root, settings):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = root.parent / f".{root.name}.{uuid.uuid4().hex}"
    try:
        total = sum(counts.values()) * len(CLASSES)
        with tqdm(total=total, desc="drawing shapes", unit="img", leave=False) as bar:
            for split, (name, count) in enumerate(counts.items()):
                for label, class_name in enumerate(CLASSES):
                    folder = draft / name / class_name
                    folder.mkdir(parents=True)
                    for number in range(count):
                        picture = draw(label, np.random.default_rng([seed, split, label, number]))
                        picture.save(folder / f"{number:04d}.jpg", quality=90)
                    bar.update(count)
        (draft / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        try:
            draft.rename(root)  # replaces an empty folder, never a full one
        except OSError:
            if not _is_finished(root, settings):  # another process was first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_finished(root: Path, settings: dict[str, int]) -> bool:
    """Return whether `root` holds the set of these settings; False means that there is nothing."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        there = json.loads((root / SETTINGS).read_text())
        differing = [f"{key}={there[key]}" for key, value in settings.items() if there[key] != value]
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"root={str(root)!r} is not a set of shapes: name a folder that is new or empty") from None
    if differing:
        raise ValueError(
            f"root={str(root)!r} holds shapes of other settings ({', '.join(differing)}): "
            "delete it or name another folder"
        )
    return True
