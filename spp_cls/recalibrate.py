"""Batch norm at another size: its averages depend on the image size, so they can be taken anew at the test size."""

from __future__ import annotations

import torch
from torch import nn

from .data import FullImage, MultiSizeDataModule, device_step


def recalibrate(net: nn.Module, datamodule: MultiSizeDataModule, size: int, num_images: int = 1024) -> None:
    """Replace the running averages of every batch norm of `net` by those of training regions at `size` px.

    The regions are those of the first epoch's plan, unmirrored and with their own colours; weights stay as they are.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError("batch_norm=recalibrated: this net has no batch norm; use batch_norm=shared")
    before = [norm.momentum for norm in norms]
    mode = net.training
    device = next(net.parameters()).device
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    seen = 0
    with torch.inference_mode():
        for batch in datamodule.regions_loader(epoch=0):
            images = device_step(
                batch.images.to(device),
                batch.uniforms.to(device),
                batch.shape if isinstance(datamodule.sizes, FullImage) else (size, size),
                mean=datamodule.mean,
                std=datamodule.std,
                flip=0,
                colour=0,
            )
            net(images)
            seen += len(images)
            if seen >= num_images:
                break
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    net.train(mode)
