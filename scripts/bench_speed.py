"""Pyramid, norms, steps and windows against their textbook forms: ratios of CPU time, one thread.

    python scripts/bench_speed.py norms pyramid step sizes windows [--compile] [--rounds 5]

"Textbook" is one AdaptiveMaxPool2d a level, the norms written with torch's own layers, NCHW, float32. In each round all
forms of one thing are run in turn; given are medians of the rounds' process CPU time. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spp_cls.cost import cost
from spp_cls.models import sppnet
from spp_cls.models.norm import LocalResponseNorm, across_channels, within_channel
from spp_cls.models.pyramid import SpatialPyramidPool2d
from spp_cls.models.sppnet import SPPNet
from spp_cls.models.windows import geometry, pool_windows

LEVELS = (6, 3, 2, 1)
LAST, FIRST = torch.channels_last, torch.contiguous_format
SCALES = (224, 256, 300, 360, 448, 560)  # He et al. 2014, §3.1.1 has six, of which it names 224 and 256


def medians(forms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time of each form; the first round, in which memory is found, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            began = time.process_time()
            form()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward_and_backward(function: Callable[[Tensor], Tensor], input: Tensor) -> Callable[[], None]:
    grad = torch.randn_like(function(input))

    def run() -> None:
        function(input.detach().requires_grad_()).backward(grad)

    return run


def in_format(input: Tensor, memory_format: torch.memory_format) -> Tensor:
    return input.contiguous(memory_format=memory_format)


# Parts


class TextbookPyramid(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([F.adaptive_max_pool2d(input, n).flatten(1) for n in LEVELS], 1)


class TextbookWithin(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input * (F.avg_pool2d(input * input, 3, 1, 1) * 5e-5 + 1) ** -0.75


def textbook_norm(norm: str) -> nn.Module:
    # torch divides alpha by size.
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0) if norm == "across_channels" else TextbookWithin()


def norms(rounds: int, compiled: bool) -> list[dict[str, Any]]:
    rows = []
    for norm, make in {"across_channels": across_channels, "within_channel": within_channel}.items():
        for shape in ((8, 96, 110, 110), (16, 96, 55, 55)):
            for name, memory_format in {"NCHW": FIRST, "channels_last": LAST}.items():
                input = in_format(torch.randn(shape), memory_format)
                forms: dict[str, nn.Module] = {"textbook": textbook_norm(norm), "ours": make()}
                if compiled:
                    torch._dynamo.reset()
                    forms["compiled"] = make()
                    forms["compiled"].compile(dynamic=False)
                found = medians({n: forward_and_backward(form, input) for n, form in forms.items()}, rounds)
                rows.append({"norm": norm, "shape": shape, "format": name, **against(found)})
    return rows


def pyramid(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for size in ((10, 10), (13, 13), (18, 18), (30, 45)):
        input = torch.randn(64, 256, *size).relu()
        ours, textbook = SpatialPyramidPool2d(LEVELS), TextbookPyramid()
        last = in_format(input, LAST)
        forms = {
            "textbook": forward_and_backward(textbook, input),
            "ours": forward_and_backward(ours, input),
            "textbook, channels_last": forward_and_backward(textbook, last),
            "ours, channels_last": forward_and_backward(ours, last),
        }
        rows.append({"map": size, **against(medians(forms, rounds))})
    return rows


def against(found: dict[str, float]) -> dict[str, Any]:
    """Milliseconds, and how many times as fast as the textbook."""
    return {name: [round(1000 * s, 2), round(found["textbook"] / s, 2)] for name, s in found.items()}


# Whole nets


def textbook(net: SPPNet, norm: str) -> SPPNet:
    """The same net of torch's own layers."""
    other = copy.deepcopy(net)
    other.pyramid = TextbookPyramid()  # type: ignore[assignment]
    for name, module in net.backbone.named_children():
        if isinstance(module, LocalResponseNorm):
            setattr(other.backbone, name, textbook_norm(norm))
    return other


def step_of(net: nn.Module, images: Tensor, bf16: bool = False) -> Callable[[], None]:
    labels = torch.arange(len(images)) % 1000

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        net.zero_grad(set_to_none=True)

    return run


def step(rounds: int, images: int, compiled: bool) -> list[dict[str, Any]]:
    rows = []
    for norm in ("within_channel", "across_channels"):
        net = sppnet("zf5", 1000, norm=norm).to(memory_format=LAST)
        bare = sppnet("zf5", 1000, norm="none").to(memory_format=LAST)
        first = torch.randn(images, 3, 224, 224)
        last = in_format(first, LAST)
        forms = {
            "textbook": step_of(textbook(net, norm).to(memory_format=FIRST), first),
            "ours": step_of(net, last),
            "ours, bf16": step_of(net, last, bf16=True),
            "no norms": step_of(bare, last),
            "no norms, bf16": step_of(bare, last, bf16=True),
        }
        if compiled:
            torch._dynamo.reset()
            whole = copy.deepcopy(net)
            whole.compile(dynamic=False)
            forms["compiled"], forms["compiled, bf16"] = step_of(whole, last), step_of(whole, last, bf16=True)
        found = medians(forms, rounds)
        shares = {
            "norms": round(1 - found["no norms"] / found["ours"], 3),
            "norms, bf16": round(1 - found["no norms, bf16"] / found["ours, bf16"], 3),
        }
        rows.append({"net": "zf5", "norm": norm, "images": images, **against(found), "share": shares})
    return rows


def sizes(rounds: int, images: int) -> list[dict[str, Any]]:
    rows = []
    matrix = torch.randn(2048, 2048)
    for name in ("zf5", "overfeat7"):
        net = sppnet(name, 1000, norm="within_channel" if name == "zf5" else "across_channels").to(memory_format=LAST)
        at = {size: in_format(torch.randn(images, 3, size, size), LAST) for size in (180, 224)}
        forms: dict[str, Callable[[], Any]] = {
            f"{size}{', bf16' if bf16 else ''}": step_of(net, at[size], bf16) for size in at for bf16 in (False, True)
        }
        forms["matmul"] = lambda: matrix @ matrix
        found = medians(forms, rounds)
        flops = {size: cost(net, (size, size)).training_flops for size in at}
        peak = 2 * 2048**3 / found["matmul"]
        rows.append(
            {
                "net": name,
                "images": images,
                "seconds": {n: round(s, 3) for n, s in found.items()},
                "180/224": round(found["180"] / found["224"], 3),
                "180/224, bf16": round(found["180, bf16"] / found["224, bf16"], 3),
                "180/224 of FLOPs": round(flops[180] / flops[224], 3),
                "share of the matmul peak": round(images * flops[224] / found["224"] / peak, 3),
            }
        )
    return rows


# Windows


def squares(net: SPPNet, size: int, places: int) -> list[tuple[int, int]]:
    """Top and left, in px, of 224 px windows at whole strides of a picture of `size` px: a grid of `places` a side."""
    stride, free = geometry(net.backbone).stride, size - 224
    steps = [i * free // max(1, places - 1) // stride * stride for i in range(places)] if free else [0]
    return [(top, left) for top in dict.fromkeys(steps) for left in dict.fromkeys(steps)]


@torch.inference_mode()
def windows(rounds: int, regions: int, at_once: int) -> list[dict[str, Any]]:
    net = sppnet("zf5", 1000, norm="within_channel").to(memory_format=LAST).eval()
    look = geometry(net.backbone)
    rows = []
    for name, scales in {"views at six scales": SCALES, "ten views": (256,)}.items():
        places = {size: squares(net, size, 3 if len(scales) > 1 else 2) for size in scales}
        # Pictures of one shape go together, each with its mirror.
        pictures = {size: in_format(torch.randn(2 * at_once, 3, size, size), LAST) for size in scales}
        views = 2 * at_once * sum(len(at) for at in places.values())

        def on_maps(places: dict[int, Any] = places, pictures: dict[int, Tensor] = pictures) -> Tensor:
            pooled = []
            for size, at in places.items():
                maps = net.backbone(pictures[size])
                cells = maps.shape[-1]
                found = [
                    (mirror, rows[0], columns[0], rows[1], columns[1])
                    for mirror in range(2 * at_once)
                    for top, left in at
                    for rows, columns in [[look.window(first, 224, cells) for first in (top, left)]]
                ]
                pooled.append(pool_windows(maps, torch.tensor(found), LEVELS))
            logits: Tensor = net.head(torch.cat(pooled))
            return logits

        def crops(places: dict[int, Any] = places, pictures: dict[int, Tensor] = pictures) -> Tensor:
            cut = [
                pictures[size][mirror, :, top : top + 224, left : left + 224]
                for size, at in places.items()
                for mirror in range(2 * at_once)
                for top, left in at
            ]
            logits: Tensor = net(in_format(torch.stack(cut), LAST))
            return logits

        found = medians({"crops": crops, "maps": on_maps}, rounds)
        whole = cost(net, (224, 224)).forward_flops
        head = 2 * sum(layer.weight.numel() for layer in net.head if isinstance(layer, nn.Linear))
        shared = sum(2 * at_once * (cost(net, (size, size)).forward_flops - head) for size in scales) + views * head
        ratio, allowed = found["crops"] / found["maps"], views * whole / shared
        rows.append(
            {
                "what": name,
                "pictures": at_once,
                "views": views,
                "seconds": {n: round(s, 3) for n, s in found.items()},
                "ratio": round(ratio, 2),
                "FLOPs allow": round(allowed, 2),
                "share": round(ratio / allowed, 3),
            }
        )
    # One picture of 688 × 917 px and many regions of it, by features.
    picture = in_format(torch.randn(1, 3, 688, 917), LAST)
    maps = net.backbone(picture)
    chance = torch.Generator().manual_seed(0)
    height, width = maps.shape[-2:]
    ends = [torch.randint(0, side, (regions, 2), generator=chance).sort(1).values for side in (height, width)]
    (top, bottom), (left, right) = (end.unbind(1) for end in ends)
    boxes = torch.stack([torch.zeros_like(top), top, left, bottom + 1, right + 1], 1)
    some = in_format(torch.randn(32, 3, 224, 224), LAST)
    found = medians(
        {
            "one pass": lambda: pool_windows(net.backbone(picture), boxes, LEVELS),
            "32 crops": lambda: net.pyramid(net.backbone(some)),
        },
        rounds,
    )
    rows.append(
        {
            "what": f"features of {regions} regions at 688 px",
            "seconds": {n: round(s, 3) for n, s in found.items()},
            "ratio": round(found["32 crops"] / 32 * regions / found["one pass"], 1),
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["norms", "pyramid", "step", "sizes", "windows"])
    parser.add_argument("--compile", action="store_true", help="compiled forms besides; needs a C++ compiler")
    parser.add_argument("--images", type=int, default=32, help="of a step")
    parser.add_argument("--at-once", type=int, default=4, help="pictures whose views are computed together")
    parser.add_argument("--regions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds, images = arguments.rounds, arguments.images
    result: dict[str, Any] = {"script": "bench_speed", "torch": torch.__version__, "rounds": rounds}
    programs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "norms": lambda: norms(rounds, arguments.compile),
        "pyramid": lambda: pyramid(rounds),
        "step": lambda: step(rounds, images, arguments.compile),
        "sizes": lambda: sizes(rounds, images),
        "windows": lambda: windows(rounds, arguments.regions, arguments.at_once),
    }
    for part in arguments.parts:
        result[part] = programs[part]()
        for row in result[part]:
            print(part, *(f"{name}={value}" for name, value in row.items()), sep="  ", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
