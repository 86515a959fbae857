from __future__ import annotations

import pytest
import torch
from torch import nn

from spp_cls.cost import Cost, available_memory, cost
from spp_cls.models.backbones import BACKBONES, Backbone
from spp_cls.models.sppnet import SPPNet, sppnet


def paper_net(name: str, norm: str) -> SPPNet:
    with torch.device("meta"):
        return SPPNet(Backbone(BACKBONES[name], norm), 1000)


# --- the paper's nets


@pytest.mark.parametrize(
    ("name", "norm", "size", "map_side", "forward_gmac", "training_gflop"),
    [
        ("zf5", "within_channel", 224, 13, 1.215, 6.95),
        ("zf5", "within_channel", 180, 10, 0.763, 4.36),
        ("overfeat7", "across_channels", 224, 18, 4.530, 26.84),
        ("overfeat7", "across_channels", 180, 14, 2.830, 16.77),
    ],
)
def test_flops_of_the_papers_nets(
    name: str, norm: str, size: int, map_side: int, forward_gmac: float, training_gflop: float
) -> None:
    found = cost(paper_net(name, norm), (size, size))
    assert (found.shape, found.map_size) == ((size, size), (map_side, map_side))
    assert found.forward_flops == pytest.approx(2e9 * forward_gmac, rel=0.01)
    assert found.training_flops == pytest.approx(1e9 * training_gflop, rel=0.01)


def test_flops_of_zf5_layer_by_layer() -> None:
    convolutions = 110**2 * 96 * 3 * 49 + 27**2 * 256 * 96 * 25 + 13**2 * 9 * (384 * 256 + 384 * 384 + 256 * 384)
    fully_connected = 12800 * 4096 + 4096 * 4096 + 4096 * 1000
    assert cost(paper_net("zf5", "none"), (224, 224)).forward_flops == 2 * (convolutions + fully_connected)


def test_parameters_and_weights() -> None:
    found = cost(paper_net("zf5", "within_channel"), (180, 180))
    assert f"{found.parameters / 1e6:.2f}" == "77.04"
    assert found.weight_bytes == 4 * found.parameters


# --- a net that can be counted by hand


def toy() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 10 * 10, 5))


def test_a_toy_net_by_hand() -> None:
    found = cost(toy(), (10, 10))
    conv, linear = 100 * 4 * 3 * 9, 400 * 5
    assert found.parameters == (4 * 27 + 4) + (400 * 5 + 5)
    assert found.forward_flops == 2 * (conv + linear)
    # Backward: the gradient of the weights of both, that of the input of the second alone.
    assert found.training_flops == 2 * (2 * conv + 3 * linear)
    # The image, and the ReLU's output, which is the linear layer's input as well.
    assert found.activation_bytes == 4 * (3 * 100 + 4 * 100)
    assert found.map_size == (0, 0)  # it has no backbone


def test_a_frozen_layer_keeps_nothing() -> None:
    net = toy()
    net[0].requires_grad_(False)
    found = cost(net, (10, 10))
    assert found.activation_bytes == 4 * 400
    assert found.training_flops == 2 * (100 * 4 * 3 * 9 + 2 * 400 * 5)
    assert found.parameters == cost(toy(), (10, 10)).parameters


def test_a_max_pool_keeps_its_input_and_the_places_of_the_maxima() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2))
    assert cost(net, (8, 8)).activation_bytes == 4 * 3 * 64 + 4 * 4 * 64 + 8 * 4 * 16


def test_the_norm_keeps_its_input_and_its_output() -> None:
    nothing, norm = (cost(paper_net("zf5", kind), (224, 224)).activation_bytes for kind in ("none", "within_channel"))
    # The ReLU's output, the norm's input, is kept in any case; more is the norm's output alone.
    assert norm - nothing == 4 * (96 * 110**2 + 256 * 27**2)


def test_memory_of_training() -> None:
    one = Cost(224, (13, 13), parameters=10, forward_flops=1, training_flops=3, activation_bytes=7, weight_bytes=40)
    assert one.training_bytes(0, "SGD") == 3 * 40  # weights, gradients, momentum
    assert one.training_bytes(5, "AdamW") == 4 * 40 + 5 * 7
    assert one.training_bytes(5) == one.training_bytes(5, "one of my own") == one.training_bytes(5, "AdamW")


# --- nothing is computed


def test_the_net_is_left_as_it_was() -> None:
    net = sppnet("tiny", 3, fc=(8,), width=0.2).eval()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    cost(net, (64, 64))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in net.parameters())
    assert not any(module.training for module in net.modules())
    assert not net.backbone._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_takes_a_map_of_one_cell() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    assert cost(net, (8, 8)).forward_flops == 2 * 4 * 3 * 64


def test_a_size_that_the_net_does_not_take() -> None:
    with pytest.raises(ValueError, match="^the net does not take images of 6 px: .+") as error:
        cost(sppnet("zf5", 3, fc=(), width=0.1), (6, 6))
    assert "\n" not in str(error.value)


def test_a_net_whose_shapes_depend_on_the_values() -> None:
    class Chosen(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[images > 0]

    with pytest.raises(NotImplementedError):
        cost(Chosen(), (8, 8))


def test_available_memory_is_a_number_of_bytes() -> None:
    memory = available_memory()
    assert memory is not None and memory > 2**20
