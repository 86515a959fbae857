"""Nets of others under the pyramid: torchvision's convolutions, our head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from .models import SPPNet, initialise
from .models.initialise import load_weights
from .models.sppnet import bins_rule

# What stands behind the convolutions in torchvision's classifiers; children are declared in the order they run in.
_HEADS = ("avgpool", "fc", "classifier", "head", "heads", "flatten", "dropout")
_SIDE_HEADS = ("AuxLogits", "aux1", "aux2")  # of Inception and GoogLeNet in training; the first stands amid the layers


class Body(nn.Sequential):
    """The convolutions of a classifier: (B, 3, H, W) → (B, out_channels, h, w). Frozen, it stays in eval mode."""

    def __init__(self, layers: OrderedDict[str, nn.Module], frozen: bool = False) -> None:
        super().__init__(layers)
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.out_channels = self._measure()

    def train(self, mode: bool = True) -> Body:
        return super().train(mode and not self.frozen)

    def _measure(self) -> int:
        mode = self.training
        try:
            with torch.no_grad():
                out = self.eval()(torch.zeros(1, 3, 128, 128))
        except (RuntimeError, IndexError, TypeError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:80]
            raise ValueError(f"takes no image of 128 px ({reason})") from error
        finally:
            self.train(mode)
        if not isinstance(out, Tensor) or out.ndim != 4:
            raise ValueError("ends in no map of channels × height × width")
        return int(out.shape[1])


def convolutions(net: nn.Module, frozen: bool = False) -> Body:
    """What `net` runs before it pools to one vector; a max pool at its end is left out, for the pyramid replaces it."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in net.named_children():
        if name in _HEADS:
            break
        if name not in _SIDE_HEADS:
            layers[name] = child
    if list(layers) == ["features"] and isinstance(net.features, nn.Sequential):
        layers = OrderedDict(net.features.named_children())
        if isinstance(net, torchvision.models.DenseNet):
            layers["relu"] = nn.ReLU(inplace=True)  # DenseNet has it in its forward
    if layers and isinstance(list(layers.values())[-1], nn.MaxPool2d):
        layers.popitem()
    return Body(layers, frozen)


def torchvision_net(
    name: str,
    num_classes: int,
    weights: str | None = None,
    frozen: bool = False,
    levels: Sequence[int] = (6, 3, 2, 1),
    pool: str = "max",
    bins: str = "appendix_a",
    fc: Sequence[int] = (),
    dropout: float = 0.0,
    init: str = "kaiming",
    init_from: str | None = None,
    seed: int = 0,
) -> SPPNet:
    """torchvision's classifier `name` with a pyramid and a new head, which alone is initialised by `init`.

    `weights` is None for torchvision's own initialisation, DEFAULT (or another name of its weights) to download, or a
    file with a state dict of the whole classifier. `frozen` trains the head alone; batch norm keeps its averages then.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        from .door import nearest

        raise ValueError(f"model.name={name!r}: torchvision has no such net{nearest(name, known)}")
    from_file = weights is not None and Path(weights).is_file()
    if weights is not None and not from_file:
        choices = [w.name for w in torchvision.models.get_model_weights(name)]
        if weights not in ("DEFAULT", *choices):
            raise ValueError(
                f"model.weights={weights}: no such file; torchvision's {name} has only DEFAULT, {', '.join(choices)}"
            )
    try:
        net = torchvision.models.get_model(name, weights=None if from_file else weights)
    except OSError as error:
        raise ValueError(f"model.weights={weights}: cannot be downloaded ({error}); name a file instead") from error
    if weights is not None and hasattr(net, "transform_input"):  # which its weights of a file do not switch on
        raise ValueError(f"model.weights={weights}: {name} was trained on pixels of another scale; use another net")
    if from_file:
        assert weights is not None
        try:
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(f"model.weights={weights}: not the weights of {name}") from error
    try:
        body = convolutions(net, frozen)
    except ValueError as error:
        raise ValueError(f"model.name={name!r}: {error}, so that no pyramid can stand on it") from error
    spp = SPPNet(body, num_classes, levels, pool, bins_rule(bins), fc, dropout)
    initialise(spp.head, init, seed)
    if init_from is not None:
        load_weights(spp, init_from)
    return spp
