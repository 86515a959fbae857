from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spp_cls.models.initialise import initialise, load_weights
from spp_cls.models.sppnet import SPPNet, sppnet


def net(**arguments: object) -> SPPNet:
    given = {"name": "zf5", "num_classes": 10, "fc": (2000, 200), "width": 0.1, **arguments}
    return sppnet(**given)  # type: ignore[arg-type]


def layers(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {n.rpartition(".")[2]: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def std(weight: Tensor) -> float:
    return float(weight.detach().std())


def same(a: SPPNet, b: SPPNet) -> dict[str, bool]:
    theirs = layers(b)
    return {name: torch.equal(layer.weight, theirs[name].weight) for name, layer in layers(a).items()}


# --- the schemes


def test_gaussian_is_the_released_zf5s() -> None:
    found = layers(net(init="gaussian"))
    for name, layer in found.items():
        n = layer.weight.numel()
        assert std(layer.weight) == pytest.approx(0.01, rel=4 / math.sqrt(2 * n)), name  # four standard errors
        assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=4 * 0.01 / math.sqrt(n)), name
    biases = {name: set(layer.bias.tolist()) for name, layer in found.items() if layer.bias is not None}
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7", "fc8"}
    assert biases == {name: {1.0 if name in ones else 0.0} for name in found}
    assert set(found) == ones | {"conv1", "conv3"}


def test_kaiming_has_the_variance_of_relu_and_a_quiet_last_layer() -> None:
    found = layers(net(init="kaiming"))
    for name, layer in found.items():
        expected = 0.001 if name == "fc8" else math.sqrt(2 / layer.weight[0].numel())
        assert std(layer.weight) == pytest.approx(expected, rel=4 / math.sqrt(2 * layer.weight.numel())), name
        assert layer.bias is not None and not layer.bias.any()


def test_the_last_layer_is_the_last_whatever_its_name() -> None:
    found = layers(net(init="kaiming", fc=(), levels=(4, 3, 2, 1)))
    assert std(found["fc6"].weight) == pytest.approx(0.001, rel=0.02)


def test_other_layers_keep_what_they_have() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(module[1].weight, 7.0)
    initialise(module, "kaiming")
    assert module[1].weight.tolist() == [7.0] * 4


def test_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="^init='orthogonal': use one of gaussian, kaiming$"):
        initialise(nn.Linear(1, 1), "orthogonal")


# --- one seed, one net


@pytest.mark.parametrize("scheme", ["gaussian", "kaiming"])
def test_nets_of_one_seed_share_what_they_have_in_common(scheme: str) -> None:
    one = net(init=scheme)
    shared = dict.fromkeys(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"), True)
    assert same(one, net(init=scheme)) == shared
    assert same(one, net(init=scheme, levels=[6])) == {**shared, "fc6": False}  # Table 2 (a) and (b)
    assert same(one, net(init=scheme, num_classes=3)) == {**shared, "fc8": False}
    assert same(one, net(init=scheme, norm="across_channels", dropout=0.1, pool="average")) == shared


def test_it_neither_depends_on_the_global_random_state_nor_moves_it() -> None:
    torch.manual_seed(1)
    one = net()
    torch.manual_seed(2)
    other, state = net(), torch.get_rng_state()
    assert all(same(one, other).values())
    initialise(one, "gaussian")
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_net_and_no_two_layers_are_alike() -> None:
    one = net(seed=1)
    assert not any(same(one, net(seed=2)).values())
    found = layers(net(init="gaussian"))
    firsts = {name: layer.weight.detach().flatten()[0].item() for name, layer in found.items()}
    assert len(set(firsts.values())) == len(firsts)


# --- weights of another run


def save(source: SPPNet, path: Path) -> Path:
    state = {f"net.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "class_weights": torch.ones(3)}}, path)
    return path


def test_all_weights_come_where_the_classes_are_as_many(tmp_path: Path) -> None:
    source, target = net(seed=1), net(seed=2)
    load_weights(target, str(save(source, tmp_path / "a.ckpt")))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_the_last_layer_stays_where_the_classes_are_others(tmp_path: Path) -> None:
    source, target = net(seed=1), net(seed=2, num_classes=3)
    before = target.head.fc8.weight.clone()
    load_weights(target, str(save(source, tmp_path / "a.ckpt")))
    assert same(target, source) == {**dict.fromkeys(layers(target), True), "fc8": False}
    assert torch.equal(target.head.fc8.weight, before)
    assert target.head.fc8.weight.shape == (3, 20)


def test_a_run_folder_means_its_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    source, target = net(seed=1), net(seed=2)
    save(source, tmp_path / "checkpoints" / "last.ckpt")
    load_weights(target, str(tmp_path))
    assert all(same(target, source).values())


def test_nothing_is_loaded_where_a_layer_does_not_fit(tmp_path: Path) -> None:
    path = save(net(levels=[6]), tmp_path / "a.ckpt")
    target = net(seed=2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"^init_from=.*a\.ckpt: its head\.fc6\.weight does not fit this net"):
        load_weights(target, str(path))
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_nothing_is_loaded_where_a_layer_is_missing(tmp_path: Path) -> None:
    path = save(sppnet("tiny", 10, fc=(), width=0.1), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"its backbone\.conv1\.weight does not fit this net \(\d+ in all do not\)$"):
        load_weights(net(), str(path))


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", {"weights": 1}, "code"])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "code":
        torch.save({"state_dict": Path}, path)  # a class: not to be loaded with weights alone
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"^init_from=.*a\.ckpt: no readable checkpoint \(.+\)$"):
        load_weights(net(), str(path))


def test_nothing_is_loaded_where_the_checkpoint_has_a_layer_more(tmp_path: Path) -> None:
    path = save(sppnet("zf5", 10, width=0.05), tmp_path / "a.ckpt")
    target = sppnet("zf5", 10, width=0.05)
    del target.backbone.conv5
    with pytest.raises(ValueError, match=r"its backbone\.conv5\.weight does not fit this net"):
        load_weights(target, str(path))
