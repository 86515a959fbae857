"""`spp plan`: what a training run would do and cost, before anything runs."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from .door import open_door

if TYPE_CHECKING:
    from torch import nn

    from .data import MultiSizeDataModule


def plan(
    net: nn.Module,
    datamodule: MultiSizeDataModule,
    epochs: int,
    ranks: int,
    accumulation: int,
    optimizer: str,
) -> str:
    """The plan for people: data, net, epoch → size → steps, FLOPs and memory at each size."""
    from .cost import available_memory, cost
    from .data import Plan

    assert datamodule.index is not None
    images = len(datamodule.index.rows("train"))
    batches = Plan(images, datamodule.batch_size, datamodule.seed, 0, ranks, accumulation)
    sizes = datamodule.planned_sizes(epochs, batches.num_batches)
    lines = [datamodule.index.describe(), ""]

    lines.append(f"{'epochs':>12} {'size px':>16} {'steps':>8}")
    steps = batches.num_batches
    runs = [(tuple(s), [e for e, _ in same]) for s, same in groupby(sizes.items(), key=lambda item: tuple(item[1]))]
    shown = runs if len(runs) <= 12 else [*runs[:8], None, *runs[-3:]]
    for entry in shown:
        if entry is None:
            lines.append(f"{'…':>12}")
            continue
        which, members = entry
        span = str(members[0]) if len(members) == 1 else f"{members[0]}–{members[-1]}"
        many = ", ".join(map(str, which[:4])) + (" …" if len(which) > 4 else "")
        lines.append(f"{span:>12} {many:>16} {steps * len(members):>8}")
    lines.append(f"{'all':>12} {'':>16} {steps * epochs:>8}")
    lines.append(
        f"\n{datamodule.batch_size} images a step = {batches.micro_batch_size} at once × {ranks} devices × "
        f"{accumulation} accumulated; {images - steps * datamodule.batch_size} of {images} left over in each epoch"
    )

    every = sorted({size for which in sizes.values() for size in which})
    chosen = every if len(every) <= 8 else [every[0], *every[1 : -1 : -(-len(every) // 6)], every[-1]]
    costs = [cost(net, size) for size in chosen]
    lines.append(f"\nnet: {costs[0].parameters:,} parameters")
    lines.append(f"{'size px':>12} {'map':>9} {'GFLOP/image':>12} {'to train':>9} {'memory at once':>15}")
    for c in costs:
        memory = c.training_bytes(batches.micro_batch_size, optimizer) / 1e9
        map_size = f"{c.map_size[0]}×{c.map_size[1]}" if c.map_size[0] else "–"
        forward, training = c.forward_flops / 1e9, c.training_flops / 1e9
        lines.append(f"{c.size:>12} {map_size:>9} {forward:>12.3f} {training:>9.3f} {memory:>12.2f} GB")
    per_size = {c.size: c.training_flops for c in costs}
    if len(per_size) == len(every):
        total = sum(per_size[s] for which in sizes.values() for s in which[:1]) * steps * datamodule.batch_size
        alone = max(per_size.values()) * epochs * steps * datamodule.batch_size
        saved = f", {1 - total / alone:.0%} less than all at {max(every)} px" if total < alone else ""
        lines.append(f"{total / 1e15:.3f} PFLOP in all{saved}")
    free = available_memory()
    if free:
        lines.append(f"main memory free: {free / 1e9:.1f} GB")
    if epochs and sizes[epochs - 1][-1] != max(every):
        lines.append(f"note: the last epoch trains at {sizes[epochs - 1][-1]} px, not at {max(every)}")
    return "\n".join(lines)


def run(config: DictConfig) -> None:
    """Everything that `spp plan` does with a config."""
    from . import build

    build.check_arguments(config)
    datamodule = build.build_datamodule(config)
    net = build.build_net(config, len(datamodule.classes))
    devices = config.trainer.devices
    ranks = (devices if isinstance(devices, int) and devices > 0 else 1) * config.trainer.num_nodes
    optimizer = str(config.optimizer._target_).rpartition(".")[2]
    accumulation = config.trainer.accumulate_grad_batches
    print(plan(net, datamodule, config.trainer.max_epochs, ranks, accumulation, optimizer))


def main(arguments: list[str] | None = None) -> None:
    """The door: the same settings as `spp train`."""
    open_door("plan", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
