"""What a net costs at an image size, found without computing anything: parameters, FLOPs, memory."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Copies of the weights that training holds beside them: gradients, and what the optimizer keeps.
_OPTIMIZER_COPIES = {"SGD": 1, "AdamW": 2, "Adam": 2, "RMSprop": 1}


@dataclass(frozen=True)
class Cost:
    """Of one image of `shape` px (height, width): a multiplication with its addition counts as two FLOPs."""

    shape: tuple[int, int]
    map_size: tuple[int, int]
    parameters: int
    forward_flops: int
    training_flops: int
    activation_bytes: int  # kept for the backward pass, in float32
    weight_bytes: int

    def training_bytes(self, images: int, optimizer: str = "AdamW") -> int:
        """Memory of weights, gradients, optimizer and of the activations of `images` at once."""
        copies = 2 + _OPTIMIZER_COPIES.get(optimizer, 2)
        return copies * self.weight_bytes + images * self.activation_bytes


def cost(net: nn.Module, shape: tuple[int, int]) -> Cost:
    """The cost of `net` for images of `shape` px (height, width).

    Raises ValueError where the net does not take that shape, NotImplementedError where it holds an operation whose
    shapes cannot be worked out without computing.
    """
    meta = copy.deepcopy(net).to("meta").train()
    kept: dict[int, int] = {}
    maps: list[tuple[int, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    def look(_: nn.Module, __: Any, out: Tensor) -> None:
        maps.append((out.shape[-2], out.shape[-1]))

    backbone = getattr(meta, "backbone", None)
    handle = backbone.register_forward_hook(look) if isinstance(backbone, nn.Module) else None
    parameters = {p.untyped_storage()._cdata for p in meta.parameters()}
    batch = 2  # batch norm needs more than one value a channel
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with FlopCounterMode(display=False) as forward:
                logits = meta(torch.empty(batch, 3, *shape, device="meta"))
            with FlopCounterMode(display=False) as backward:
                if logits.requires_grad:
                    logits.sum().backward()
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the net does not take images of {in_px(shape)}: {_first_line(error)}") from error
    finally:
        if handle is not None:
            handle.remove()
    activations = sum(size for storage, size in kept.items() if storage not in parameters)
    return Cost(
        shape=shape,
        map_size=maps[-1] if maps else (0, 0),
        parameters=sum(p.numel() for p in net.parameters()),
        forward_flops=forward.get_total_flops() // batch,
        training_flops=(forward.get_total_flops() + backward.get_total_flops()) // batch,
        activation_bytes=activations // batch,
        weight_bytes=sum(p.numel() * p.element_size() for p in net.parameters()),
    )


def check_shapes(net: nn.Module, wanted: Iterable[tuple[str, tuple[int, int]]]) -> None:
    """Raise ValueError, with what wants it, where `net` does not take a shape; one that cannot be counted passes."""
    first: dict[tuple[int, int], str] = {}
    for what, shape in wanted:
        first.setdefault(shape, what)
    with contextlib.suppress(NotImplementedError):
        for shape, what in first.items():
            try:
                cost(net, shape)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error


def in_px(shape: tuple[int, int]) -> str:
    """A shape for people: `224 px` of a square, `224×336 px` (height × width) else."""
    height, width = shape
    return f"{height} px" if height == width else f"{height}×{width} px"


def too_large(images: int, shape: tuple[int, int], accumulation: int) -> str:
    """What to say, and what to change, where `images` of `shape` at once do not fit into memory."""
    return (
        f"{images} images of {in_px(shape)} at once do not fit into memory: set "
        f"trainer.accumulate_grad_batches={2 * accumulation} or a smaller data.batch_size"
    )


def gpu_memory(accelerator: str) -> tuple[str, int] | None:
    """Name and bytes of the GPU that a trainer with this `accelerator` takes here; None where it takes none."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.name, properties.total_memory


def available_memory() -> int | None:
    """Bytes of main memory that can be had now; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
