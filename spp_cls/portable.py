"""A net as one file for every image size and for other runtimes: written, loaded, compared with the net.

The file takes `pixels` (B, 3, H, W), RGB in uint8, for any B ≥ 1 and any H and W between two limits, and gives `logits`
and `probabilities`, (B, K) both. Normalisation and softmax are in the graph: pixels are what a decoder gives, a quarter
of the bytes of floats, and nobody has to copy means. Resizing is not, because only the user knows whether a picture is
to be cut or taken whole. What else is needed to use it lies in it as JSON, under the name `spp_cls`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as size_reasoning
from tqdm import tqdm

from .data.device import normalise
from .whole import written_whole

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".aoti.pt2"}
KEY = "spp_cls"  # of the JSON: in metadata_props of ONNX, extra_files of torch.export, metadata of AOTInductor
OUTPUTS = ("logits", "probabilities")
MAX_PIXELS = 640 * 480  # of a batch that is compared, so that fifty take seconds
_ONNX_LIMIT = 2_000_000_000  # bytes of weights that fit into a file of ONNX, which is one protobuf

BatchShape = tuple[int, int, int]  # pictures; height and width in px
Program = Callable[[Tensor], Sequence[Tensor]]  # pixels → logits, probabilities


@dataclass(frozen=True)
class Agreement:
    """How far a file is from its net where it is worst, as a share of the largest logit, and for what batch."""

    difference: float
    worst: BatchShape


class FromPixels(nn.Module):
    """`net` with normalisation before it and softmax behind; `mean` and `std` are in grey levels."""

    scale: Tensor
    offset: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        scale = 1 / torch.tensor(tuple(std))[:, None, None]
        self.register_buffer("scale", scale)
        self.register_buffer("offset", -torch.tensor(tuple(mean))[:, None, None] * scale)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.net(pixels.float() * self.scale + self.offset)
        return logits, logits.softmax(-1)


def write(net: nn.Module, path: Path, format: str, about: dict[str, Any], tolerance: float = 1e-5) -> Agreement:
    """Write `net` to `path` as `onnx`, `torch` (torch.export) or `aoti` (AOTInductor), with `about` in it.

    Of `about`, mean, std, smallest_size and largest_size are used here. The file is loaded anew and compared with the
    net at fifty sizes. Raises ValueError where it cannot be made, or differs by more than `tolerance` of the largest
    logit; then there is no file.
    """
    check_format(format)
    limits = (about["smallest_size"], about["largest_size"])
    mean, std = about["mean"], about["std"]
    with written_whole(path, path.suffix) as beside:
        with _quiet():
            try:
                _WRITERS[format](trace(FromPixels(net, mean, std).eval(), limits), beside, json.dumps(about))
            except OSError:  # a full disk, a folder that cannot be written
                raise
            except Exception as error:  # exporters raise nearly everything, from UserError to AssertionError
                raise ValueError(f"format={format}: the net has no form for all sizes ({_reason(error)})") from error
            agreement = compare(
                lambda pixels: net(normalise(pixels, mean, std)), load(beside, format)[0], shapes_to_try(*limits)
            )
        if not agreement.difference <= tolerance:  # nor nan
            raise ValueError(
                f"{path} is refused: at {_in_words(agreement.worst)} it differs from the net by "
                f"{agreement.difference:.1e} of the largest logit; {tolerance:.0e} is allowed"
            )
    return agreement


def check_format(format: str) -> None:
    """Raise ValueError where `format` is none, or needs what is not installed."""
    if format not in SUFFIXES:
        raise ValueError(f"format={format}: use one of {', '.join(SUFFIXES)}")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f'format=onnx needs {", ".join(missing)}: pip install "spp_cls[export]"')
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            raise ValueError("format=aoti needs a C++ compiler, and there is none: install g++, or use onnx") from error


def trace(net: nn.Module, limits: tuple[int, int]) -> ExportedProgram:
    """The graph of `net`, a module of pixels, with batch, height and width free; sides within `limits` in px."""
    smallest, largest = limits
    height, width = (round(smallest + share * (largest - smallest)) for share in (0.3, 0.4))
    # Dim.AUTO, because a named one refuses what holds at every size but is not seen to, like a pool that rounds up.
    # Oblivious, or a map of one cell would be a case of its own. Whether all sizes are right is compared afterwards.
    side = Dim.AUTO(min=smallest, max=largest)
    with torch.no_grad(), size_reasoning.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
        program = torch.export.export(net, (example,), dynamic_shapes={"pixels": {0: Dim.AUTO, 2: side, 3: side}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the folders of this machine are of no use in the file
    return program


def _write_onnx(program: ExportedProgram, path: Path, about: str) -> None:
    if sum(weight.nbytes for weight in program.state_dict.values()) > _ONNX_LIMIT:
        raise ValueError("one file of ONNX holds 2 GB; use format=torch")
    onnx = torch.onnx.export(
        program,
        input_names=["pixels"],
        output_names=OUTPUTS,
        dynamic_shapes={"pixels": {0: "batch", 2: "height", 3: "width"}},
        dynamo=True,
        verbose=False,
    )
    assert onnx is not None
    onnx.model.metadata_props[KEY] = about
    onnx.save(path)


def _write_torch(program: ExportedProgram, path: Path, about: str) -> None:
    program.example_inputs = None  # megabytes of nothing
    torch.export.save(program, path, extra_files={KEY: about})


def _write_aoti(program: ExportedProgram, path: Path, about: str) -> None:
    settings = {"aot_inductor.metadata": {KEY: about}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch, "aoti": _write_aoti}


def load(path: Path, format: str) -> tuple[Program, dict[str, Any]]:
    """What `write` wrote: a function pixels (B, 3, H, W) → logits, probabilities (B, K) on the CPU, and its `about`."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(pixels: Tensor) -> list[Tensor]:
            return [torch.from_numpy(output) for output in session.run(OUTPUTS, {"pixels": pixels.numpy()})]

        return run, json.loads(session.get_modelmeta().custom_metadata_map[KEY])
    if format == "torch":
        files = {KEY: ""}
        program = torch.export.load(path, extra_files=files)
        return program.module(), json.loads(files[KEY])
    package = torch._inductor.aoti_load_package(str(path))
    return package, json.loads(package.get_metadata()[KEY])


def compare(net: Callable[[Tensor], Tensor], program: Program, shapes: list[BatchShape]) -> Agreement:
    """How far the logits of `program` are from those of `net`, a function of pixels, on pictures of `shapes`.

    Of the largest logit of all shapes, because at a single one the logits of a net may be next to nothing. What its
    probabilities are from the softmax of its logits counts as well.
    """
    differences, largest = [], 0.0
    for i, shape in enumerate(tqdm(shapes, "comparing", unit="size", leave=False, disable=None, file=sys.stderr)):
        pixels = clouds(shape, seed=i)
        with torch.inference_mode():
            try:
                expected = net(pixels)
            except RuntimeError as error:
                raise ValueError(f"the net takes no images of {_in_words(shape)} ({_reason(error)})") from error
            try:
                logits, probabilities = program(pixels)
            except Exception as error:  # of three runtimes
                raise ValueError(f"the file was made, but fails at {_in_words(shape)} ({_reason(error)})") from error
        off = (probabilities - logits.softmax(-1)).abs().max().item()
        differences.append(((logits - expected).abs().max().item(), off))
        largest = max(largest, expected.abs().max().item())
    shares = [max(apart / largest, off) if largest > 0 else math.nan for apart, off in differences]
    worst = max(range(len(shares)), key=lambda i: math.inf if math.isnan(shares[i]) else shares[i])
    return Agreement(shares[worst], shapes[worst])


def shapes_to_try(smallest: int, largest: int, number: int = 50, seed: int = 0) -> list[BatchShape]:
    """Batches of 1 to 3, sides in px even in their logarithm; the first three have the limits themselves."""
    chance = random.Random(seed)
    shapes = [(1, smallest, smallest), (2, smallest, largest), (3, largest, smallest)]

    def side(most: int) -> int:
        return round(math.exp(chance.uniform(math.log(smallest), math.log(max(smallest, min(most, largest))))))

    while len(shapes) < number:
        batch, one = chance.randint(1, 3), side(largest)
        other = side(MAX_PIXELS // (batch * one))
        shapes.append((batch, one, other) if chance.random() < 0.5 else (batch, other, one))
    return shapes


def clouds(shape: BatchShape, seed: int) -> Tensor:
    """Coloured pictures (B, 3, H, W) in uint8; in mere noise all bins have the same maximum, the wrong ones too."""
    batch, *sides = shape
    coarse = torch.rand(batch, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, sides, mode="bilinear").to(torch.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves, which is of no use to who has a net to export."""
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch.utils.cpp_extension", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="No complete tensor found in the group"
            )  # of channels_last weights
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def _in_words(shape: BatchShape) -> str:
    return f"{shape[1]}×{shape[2]} px (batch {shape[0]})"
