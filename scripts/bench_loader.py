"""Measure what reading the training pictures costs: images per second of one core, beside other loaders.

    python scripts/bench_loader.py                          # draws its own pictures, so that it needs no data
    python scripts/bench_loader.py --root data/caltech101   # pictures made of those in a folder

The others are torchvision's ImageFolder with Pillow and the usual transforms, with and without colour jitter, and
timm's loader where timm is installed. All read the same pictures from a warm disk cache, in one process, in batches of
64; time is the CPU time of that process, all its threads together. In every round each variant reads all pictures, one
variant after the other in an order of chance, and ratios are taken within a round. Ours is timed twice: uint8 regions
as the loader gives them, and with the device step on the same core (flip, colour, normalisation), after which it has
what the others give: floats of 224 px. PSNR is picture by picture, and 99 dB stands for equal pixels. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, features
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from spp_cls.data import MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.plan import CROP_X, CROP_Y
from spp_cls.data.sizes import single

BATCH, RESIZE, REGION = 64, 256, 224
# Longer side in px, JPEG quality, noise in grey levels: photos then have about 95 kB, big ones about 350 kB.
SETS = {"caltech": (300, 75, 10), "photos": (500, 94, 10), "big": (1600, 90, 5)}
BIG = 128  # pictures of the set of big ones, at most
OURS: dict[str, dict[str, Any]] = {
    "folder": {"draft": False},
    "folder_draft": {"draft": True},
    "packed_jpeg": {"draft": False, "cache": "jpeg"},
    "raw": {"draft": False, "cache": "raw"},
}
LEAST = 0.3  # seconds of CPU time that a figure of one round is taken from
BASELINES = ("baseline", "baseline_no_jitter")
Speeds = dict[str, list[float]]  # variant → images per second of CPU time, by round


def make_pictures(root: Path, name: str, files: list[Path], number: int, seed: int) -> dict[str, Any]:
    """Fill `root/<class>/` with `number` pictures of the set `name`, made of `files` if there are any."""
    rng = np.random.default_rng([seed, list(SETS).index(name)])
    longer, quality, noise = SETS[name]
    made = []
    for i in range(number):
        path = root / ("even", "odd")[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if files and name == "caltech":
            shutil.copyfile(files[i % len(files)], path)
        else:
            image = enlarged(files[i % len(files)], longer) if files else drawn(longer, rng)
            noisy = np.asarray(image) + rng.normal(0, noise, (image.height, image.width, 3))
            Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(path, quality=quality)
        with Image.open(path) as image:
            made.append((*image.size, path.stat().st_size / 1000))
    medians = zip(("width", "height", "kB"), np.median(made, axis=0).round(1).tolist(), strict=True)
    return {"made_of": "files" if files else "drawings", "median": dict(medians)}


def enlarged(file: Path, longer: int) -> Image.Image:
    image = pillow_rgb(file)
    scale = longer / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def drawn(longer: int, rng: np.random.Generator) -> Image.Image:
    """Two smooth fields of chance, one showing through polygons laid over the other."""
    width, height = rng.permutation([longer, round(longer * rng.uniform(0.6, 0.8))]).tolist()
    fields = torch.full((2, 3, height, width), 128.0)
    for octave in range(5):  # the finer the weaker
        cells = torch.from_numpy(rng.normal(0, 60 * 0.55**octave, (2, 3, 4 << octave, 4 << octave)))
        fields += F.interpolate(cells.float(), (height, width), mode="bicubic")
    above, below = (Image.fromarray(f) for f in fields.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy())
    mask = Image.new("L", (width, height))
    for _ in range(12):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 5))
        around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.03, 0.25) * longer
        corners = rng.uniform((0, 0), (width, height)) + around
        ImageDraw.Draw(mask).polygon([(x, y) for x, y in corners.tolist()], fill=int(rng.integers(256)))
    return Image.composite(above, below, mask)


def ours(root: Path, **options: Any) -> MultiSizeDataModule:
    layout = partial(folder, val_share=1e-6, test_share=1e-6)  # one picture of each class, the least
    sizes = partial(single, size=REGION)
    datamodule = MultiSizeDataModule(str(root), layout, sizes, batch_size=BATCH, num_workers=0, **options)
    datamodule.setup()
    return datamodule


def train_paths(datamodule: MultiSizeDataModule) -> list[Path]:
    index = datamodule.index
    assert index is not None
    return [index.path(row) for row in index.rows("train")]


def read_ours(datamodule: MultiSizeDataModule, device_step: bool, epoch: int) -> int:
    images = 0
    for batch in datamodule.regions_loader(epoch):
        if device_step:
            datamodule.on_after_batch_transfer(batch, 0)
        images += len(batch.labels)
    return images


def read_other(loader: DataLoader[Any], epoch: int) -> int:
    random.seed(epoch)
    torch.manual_seed(epoch)
    return sum(len(labels) for _, labels in loader)


def torchvision_loader(dataset: ImageFolder, jitter: bool) -> DataLoader[Any]:
    chain = [transforms.Resize(RESIZE), transforms.RandomCrop(REGION), transforms.RandomHorizontalFlip()]
    chain += [transforms.ColorJitter(0.4, 0.4, 0.4)] if jitter else []
    chain += [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    dataset.transform = transforms.Compose(chain)
    return DataLoader(dataset, BATCH, shuffle=True, drop_last=True)


def timm_loader(dataset: ImageFolder) -> DataLoader[Any] | None:
    """timm's training loader as it comes, but for its prefetcher for CUDA; None where timm is not installed."""
    try:
        from timm.data import create_loader  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        print(f"timm is left out: {error}", file=sys.stderr)
        return None
    options = {"hflip": 0.5, "color_jitter": 0.4, "auto_augment": None, "no_aug": False, "use_prefetcher": False}
    options |= {"num_workers": 0, "persistent_workers": False}  # torch has the one refused without the other
    loader: DataLoader[Any] = create_loader(dataset, (3, REGION, REGION), BATCH, is_training=True, **options)
    return loader


def time_all(passes: dict[str, Callable[[int], int]], rounds: int, seconds: float, seed: int) -> Speeds:
    """Time passes, functions epoch → images that were delivered; no round begins after `seconds`."""
    for one_pass in passes.values():
        one_pass(0)  # caches fill, files get into memory
    chance, began = random.Random(seed), time.monotonic()
    speeds: Speeds = {name: [] for name in passes}
    for number in range(1, rounds + 1):
        if number > 1 and time.monotonic() - began > seconds:
            break
        for name in chance.sample(list(passes), len(passes)):
            images, spent, before = 0, 0.0, time.process_time()
            while spent < LEAST:  # a raw cache gives the pictures in milliseconds
                images += passes[name](number)
                spent = time.process_time() - before
            speeds[name].append(images / spent)
    return speeds


def make_figures(speeds: Speeds) -> dict[str, Any]:
    """Variant → images per second and ratios: for ours all of them, with the device step and without."""
    figures: dict[str, Any] = {}
    for name, values in speeds.items():
        variant, _, step = name.partition("+")
        found = {f"{step}images_per_second": spread(values, 1)}
        found |= {f"{step}ratio_to_{other}": spread(np.divide(values, speeds[other]), 3) for other in BASELINES}
        figures[variant] = figures.get(variant, {}) | found
    return figures


def spread(values: Any, digits: int) -> dict[str, float]:
    return {of.__name__: round(float(of(values)), digits) for of in (np.median, min, max)}


def make_fidelity(datamodules: dict[str, MultiSizeDataModule]) -> dict[str, Any]:
    """How far the regions of epoch 0 are from Pillow's (folder) and from the folder's (the others)."""
    if "folder" not in datamodules:
        return {}
    first = datamodules["folder"]
    found: dict[str, Any] = {"folder": {"against": "pillow"} | compare(regions(first), pillow_regions(first))}
    for name in list(datamodules)[1:]:
        found[name] = {"against": "folder"} | compare(regions(datamodules[name]), regions(first))
    return found


def compare(these: Iterator[Tensor], those: Iterator[Tensor]) -> dict[str, Any]:
    worst, psnr = 0.0, []
    for a, b in zip(these, those, strict=True):
        difference = (a.float() - b.float()).flatten(1)
        worst = max(worst, difference.abs().max().item())
        psnr += (10 * torch.log10(255**2 / difference.square().mean(dim=1))).clamp(max=99).tolist()
    return {"max_difference": worst, "psnr": spread(psnr, 2)}


def regions(datamodule: MultiSizeDataModule) -> Iterator[Tensor]:
    return (batch.images for batch in datamodule.regions_loader(0))


def pillow_regions(datamodule: MultiSizeDataModule) -> Iterator[Tensor]:
    """The same regions by Pillow alone: the whole picture resized, then cropped."""
    paths = train_paths(datamodule)
    for planned in datamodule.plan.micro_batches(0):
        pixels = []
        for i, uniforms in zip(planned.indices, planned.uniforms, strict=True):
            image = pillow_rgb(paths[i])
            width, height = (max(RESIZE, round(side * (RESIZE / min(image.size)))) for side in image.size)
            left, top = int(uniforms[CROP_X] * (width - REGION + 1)), int(uniforms[CROP_Y] * (height - REGION + 1))
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels.append(np.asarray(resized.crop((left, top, left + REGION, top + REGION))))
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def pillow_rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def measure(root: Path, variants: list[str], rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    datamodules = {name: ours(root, **options) for name, options in OURS.items() if name in variants}
    train = {str(path) for path in train_paths(ours(root))}  # the others read these and no more
    dataset = partial(ImageFolder, str(root), is_valid_file=lambda path: path in train)
    passes: dict[str, Callable[[int], int]] = {
        name: partial(read_other, torchvision_loader(dataset(), jitter=name == "baseline")) for name in BASELINES
    }
    timm = timm_loader(dataset()) if "timm" in variants else None
    passes |= {"timm": partial(read_other, timm)} if timm else {}
    for name, datamodule in datamodules.items():
        passes |= {name: partial(read_ours, datamodule, False), f"{name}+device_": partial(read_ours, datamodule, True)}
    speeds = time_all(passes, rounds, seconds, seed)
    figures = dict.fromkeys([*BASELINES, *variants]) | make_figures(speeds)
    return {"rounds": len(speeds["baseline"]), "figures": figures, "fidelity": make_fidelity(datamodules)}


def print_table(measured: dict[str, Any]) -> None:
    print(f"{'':20}{'images/s':>9}{'least–most':>16}{'× baseline':>12}{'× no jitter':>13}{'+device, × baseline':>21}")
    for variant, figures in measured["figures"].items():
        if figures is None:
            print(f"{variant:20}{'–':>9}")
            continue
        speed = figures["images_per_second"]
        line = f"{variant:20}{speed['median']:9.1f}{speed['min']:8.1f}–{speed['max']:<7.1f}"
        with_jitter, without = (figures[f"ratio_to_{other}"]["median"] for other in BASELINES)
        line += f"{with_jitter:12.2f}{without:13.2f}"
        print(line + (f"{figures['device_ratio_to_baseline']['median']:21.2f}" if variant in OURS else ""))
    for variant, found in measured["fidelity"].items():
        psnr = f"PSNR {found['psnr']['median']} dB (median), {found['psnr']['min']} dB (least)"
        print(f"{variant} against {found['against']}: at most {found['max_difference']:g} grey levels, {psnr}")


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count()}


def versions() -> dict[str, str | None]:
    packages = ("spp_cls", "torch", "torchvision", "torchcodec", "pillow", "numpy", "timm")
    installed = {name: found[0].version for name in packages if (found := list(metadata.distributions(name=name)))}
    return {"python": platform.python_version(), **installed, "libjpeg_turbo": features.version("libjpeg_turbo")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["timm", *OURS]
    parser.add_argument("--pictures", choices=[*SETS, "all"], default="all", help="the set (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="make the sets of the files *.jpg below this folder")
    parser.add_argument(
        "--number", type=int, default=1000, help=f"of a set, in whole batches; of big ones {BIG} at most"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round of a set later")
    parser.add_argument("--variants", nargs="+", choices=choices, default=choices, help="beside the baselines")
    parser.add_argument("--work", type=Path, help="where the temporary folder of the pictures is made")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and order (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.number < BATCH or arguments.rounds < 1:
        parser.error(f"--number={arguments.number} --rounds={arguments.rounds}: give at least {BATCH} and 1")
    files = sorted(arguments.root.glob("**/*.jpg")) if arguments.root else []
    if arguments.root and not files:
        parser.error(f"--root={arguments.root}: no files *.jpg below it")
    random.Random(arguments.seed).shuffle(files)
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or ours would pin memory
    report: dict[str, Any] = {"script": "bench_loader", "machine": machine(), "versions": versions(), "sets": {}}
    for name in SETS if arguments.pictures == "all" else [arguments.pictures]:
        number = min(arguments.number, BIG if name == "big" else arguments.number) // BATCH * BATCH
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            os.environ["SPP_CACHE"] = str(Path(work) / "cache")  # goes with the pictures
            root = Path(work) / "pictures"
            made = make_pictures(root, name, files, number + 4, arguments.seed)  # 2 classes, one each for val and test
            found = measure(root, arguments.variants, arguments.rounds, arguments.seconds, arguments.seed)
        report["sets"][name] = {"pictures": number, **made, **found}
        print(
            f"\n{name}: {number} pictures made of {made['made_of']}, medians {made['median']}, {found['rounds']} rounds"
        )
        print_table(found)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
