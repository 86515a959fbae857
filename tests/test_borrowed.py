from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from spp_cls.borrowed import Body, convolutions, torchvision_net
from spp_cls.models.initialise import initialise
from spp_cls.models.sppnet import SPPNet

# torchvision's remark on how its GoogLeNet and Inception start.
pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization of:FutureWarning")

SMALL = "shufflenet_v2_x0_5"  # 0.3 million parameters under its head, with batch norm


def images(size: int = 64, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def pooled(last: str, pool: str = "avgpool") -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: getattr(net, last)(getattr(net, pool)(x).flatten(1))


# What torchvision does with the map of each of its nets, up to the logits.
HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "resnet18": pooled("fc"),
    "alexnet": lambda net, x: net.classifier(net.avgpool(F.max_pool2d(x, 3, 2)).flatten(1)),  # its last pool is ours
    "mobilenet_v3_small": pooled("classifier"),
    "efficientnet_b0": pooled("classifier"),
    "regnet_y_400mf": pooled("fc"),
    "googlenet": pooled("fc"),
    "inception_v3": pooled("fc"),
    "swin_t": pooled("head"),
    "convnext_tiny": lambda net, x: net.classifier(net.avgpool(x)),
    "densenet121": lambda net, x: net.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1)),
    "shufflenet_v2_x0_5": lambda net, x: net.fc(x.mean([2, 3])),
    "mnasnet0_5": lambda net, x: net.classifier(x.mean([2, 3])),
    "squeezenet1_1": lambda net, x: net.classifier(x).flatten(1),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_body_is_all_that_stands_before_torchvisions_own_head(name: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None)
    if name == "googlenet":
        initialise(net, "kaiming")  # as it starts, no image reaches its end
    body = convolutions(net)
    net.eval()
    x = images(96 if name == "inception_v3" else 64)
    with torch.no_grad():
        maps, expected = body(x), net(x)
        assert maps.shape[:2] == (2, body.out_channels)
        assert torch.equal(HEADS[name](net, maps), expected)
    assert not torch.equal(expected[0], expected[1])


def test_the_logits_are_those_of_body_pyramid_and_head() -> None:
    net = torchvision_net(SMALL, 7, levels=(2, 1), pool="average", fc=(16,), dropout=0.5).eval()
    with torch.no_grad():
        maps = net.backbone(images())
        vector = torch.cat([F.adaptive_avg_pool2d(maps, n).flatten(1) for n in (2, 1)], 1)
        logits = net(images())
        assert torch.equal(logits, net.head(vector))
    assert logits.shape == (2, 7)
    assert [name for name, _ in net.head.named_children()] == ["fc6", "relu6", "drop6", "fc7"]
    assert net(images(97)).shape == (2, 7)


def test_the_head_alone_is_initialised() -> None:
    def built(seed: int, torch_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch_seed)
        return torchvision_net(SMALL, 7, seed=seed).state_dict()

    one, same_head, same_body = built(1, 1), built(1, 2), built(2, 1)
    assert torch.equal(one["head.fc6.weight"], same_head["head.fc6.weight"])
    assert not torch.equal(one["head.fc6.weight"], same_body["head.fc6.weight"])
    assert not torch.equal(one["backbone.conv1.0.weight"], same_head["backbone.conv1.0.weight"])
    assert all(torch.equal(value, same_body[name]) for name, value in one.items() if name.startswith("backbone."))
    assert float(one["head.fc6.weight"].std()) == pytest.approx(0.001, rel=0.01)


def test_measuring_the_body_moves_nothing() -> None:
    net = torchvision.models.get_model(SMALL, weights=None)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert convolutions(net).training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- frozen


def trained_a_step(net: SPPNet) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after a step of training."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(net(images(count=4)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    return before, net.state_dict()


def test_frozen_the_head_trains_alone_and_batch_norm_keeps_its_averages() -> None:
    net = torchvision_net(SMALL, 3, frozen=True)
    before, after = trained_a_step(net)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"head.fc6.weight", "head.fc6.bias"}
    assert all(p.grad is None and not p.requires_grad for p in net.backbone.parameters())
    assert net.training and net.head.training and not any(m.training for m in net.backbone.modules())
    assert isinstance(net.backbone, Body) and net.backbone.frozen


def test_not_frozen_everything_moves() -> None:
    net = torchvision_net(SMALL, 3)
    nn.init.normal_(net.head.fc6.weight)  # type: ignore[arg-type]
    before, after = trained_a_step(net)
    still = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert still == set()
    assert all(m.training for m in net.modules())


# --- weights


def test_weights_of_a_file_come_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.manual_seed(0)
    source = torchvision.models.get_model("mobilenet_v3_small", weights=None)
    torch.save(source.state_dict(), path)
    expected = convolutions(source).state_dict()
    torch.manual_seed(1)
    found = torchvision_net("mobilenet_v3_small", 7, weights=str(path)).backbone.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("content", ["another net", "its classifier is missing", "no dict", "text", "nothing"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pth"
    state = torchvision.models.get_model(SMALL, weights=None).state_dict()
    if content in ("text", "nothing"):
        path.write_text("weights" if content == "text" else "")
    elif content == "another net":
        torch.save(torchvision.models.get_model("mnasnet0_5", weights=None).state_dict(), path)
    else:
        torch.save([1, 2] if content == "no dict" else {k: v for k, v in state.items() if "fc" not in k}, path)
    with pytest.raises(ValueError, match=rf"^model\.weights=.*weights\.pth: not the weights of {SMALL}$"):
        torchvision_net(SMALL, 7, weights=str(path))


def test_weights_that_are_neither_file_nor_name() -> None:
    message = rf"^model\.weights=nowhere\.pth: no such file; torchvision's {SMALL} has only DEFAULT, IMAGENET1K_V1$"
    with pytest.raises(ValueError, match=message):
        torchvision_net(SMALL, 7, weights="nowhere.pth")


def test_init_from_a_run_of_other_classes(tmp_path: Path) -> None:
    source = torchvision_net(SMALL, 4, fc=(8,), seed=1)
    torch.save({"state_dict": {f"net.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.ckpt")
    net = torchvision_net(SMALL, 7, fc=(8,), seed=2, init_from=str(tmp_path / "a.ckpt"))
    same = {name for name, value in net.state_dict().items() if value.shape == source.state_dict()[name].shape}
    assert set(net.state_dict()) - same == {"head.fc7.weight", "head.fc7.bias"}
    assert all(torch.equal(net.state_dict()[name], source.state_dict()[name]) for name in same)


# --- nets that are none


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.name='resnt18': torchvision has no such net; did you mean resnet18\?$"
    ):
        torchvision_net("resnt18", 7)
    with pytest.raises(ValueError, match=r"^model\.name='xyz': torchvision has no such net$"):
        torchvision_net("xyz", 7)


def test_a_transformer_of_patches_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^model\.name='vit_b_16': .*so that no pyramid can stand on it$") as error:
        torchvision_net("vit_b_16", 7)
    assert "\n" not in str(error.value)


def test_a_net_that_ends_in_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="^ends in no map of channels × height × width$"):
        convolutions(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def test_a_net_that_fails_without_a_word_is_refused() -> None:
    class Silent(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(ValueError, match=r"^takes no image of 128 px \(AssertionError\)$"):
        convolutions(nn.Sequential(Silent()))
