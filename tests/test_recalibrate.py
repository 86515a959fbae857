from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spp_cls.data import MultiSizeDataModule
from spp_cls.data.device import normalise, resize
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.recalibrate import recalibrate


@pytest.fixture
def datamodule(pictures: Path) -> MultiSizeDataModule:
    sizes = partial(alternating, sizes=[26, 32])
    datamodule = MultiSizeDataModule(
        str(pictures), folder, sizes, batch_size=8, region=32, resize=36, num_workers=0, seed=3
    )
    datamodule.setup()
    return datamodule


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(2),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def regions(datamodule: MultiSizeDataModule, size: int, number: int) -> list[Tensor]:
    """The batches of the first epoch, neither mirrored nor coloured."""
    batches = list(datamodule.regions_loader(0))[:number]
    return [normalise(resize(batch.images, size).float(), datamodule.mean, datamodule.std) for batch in batches]


def averages(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel in each batch, averaged over the batches."""
    flat = [out.transpose(0, 1).flatten(1) for out in outputs]  # (B, C, h, w) → (C, B·h·w)
    return torch.stack([f.mean(1) for f in flat]).mean(0), torch.stack([f.var(1) for f in flat]).mean(0)


def assert_averages(net: nn.Sequential, batches: list[Tensor]) -> None:
    with torch.no_grad():
        first = [net[0](images) for images in batches]
        mean, var = averages(first)
        torch.testing.assert_close(net[1].running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net[1].running_var, var, rtol=1e-4, atol=1e-5)
        # The second norm sees what the first one gives in training: normalised by the batch itself.
        second = [
            net[3](torch.relu(nn.functional.batch_norm(out, None, None, net[1].weight, net[1].bias, training=True)))
            for out in first
        ]
        mean, var = averages(second)
        torch.testing.assert_close(net[4].running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net[4].running_var, var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "num_images", "batches"), [(32, 1024, 4), (26, 1024, 4), (26, 16, 2), (26, 17, 3), (26, 1, 1)]
)
def test_the_running_averages_are_those_of_the_regions(
    datamodule: MultiSizeDataModule, net: nn.Sequential, size: int, num_images: int, batches: int
) -> None:
    recalibrate(net, datamodule, size, num_images)
    assert_averages(net, regions(datamodule, size, batches))
    assert int(net[1].num_batches_tracked) == batches


def test_again_at_another_size(datamodule: MultiSizeDataModule, net: nn.Sequential) -> None:
    # Nothing is left of the first time: neither its averages nor how far it read.
    recalibrate(net, datamodule, 32, num_images=16)
    recalibrate(net, datamodule, 26, num_images=16)
    assert_averages(net, regions(datamodule, 26, 2))
    assert datamodule.state_dict() == {"epoch": 0, "batch": 0}


@pytest.mark.parametrize("training", [True, False])
def test_all_else_stays(datamodule: MultiSizeDataModule, net: nn.Sequential, training: bool) -> None:
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    recalibrate(net, datamodule, 26)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {
        f"{norm}.{name}" for norm in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [net[1].momentum, net[4].momentum] == [0.3, 0.1]
    assert all(module.training is training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    # The net can still be trained: nothing of inference mode has stayed in it.
    net.train()
    net(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_net_without_batch_norm_is_refused(datamodule: MultiSizeDataModule) -> None:
    with pytest.raises(
        ValueError, match=r"^batch_norm=recalibrated: this net has no batch norm; use batch_norm=shared$"
    ):
        recalibrate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), datamodule, 32)
