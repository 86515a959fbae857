"""Initial weights: what each source starts from, drawn for each parameter by its own name.

Two nets of one seed share the weights of all layers that they have in common, whatever else differs, so that rows of
a table can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn

# The released ZF-5 starts these biases at 1, conv1's and conv3's at 0 (its training definition, `model-defs`).
_ONES = ("conv2", "conv4", "conv5", "conv6", "conv7", "fc6", "fc7", "fc8")


def initialise(net: nn.Module, scheme: str, seed: int = 0) -> None:
    """Set the convolutions and linear layers of `net` by `scheme`, in place; other layers keep what they have.

    * `gaussian`: the paper's, σ = 0.01 everywhere, biases of the released ZF-5. Needs pixels of 0–255 and many steps.
    * `kaiming`: He et al. 2015 for ReLU, biases 0, and a last layer of σ = 0.001: the maximum over bins makes the
      outputs of plain Kaiming so large that small data sets stay at chance.
    """
    if scheme not in ("gaussian", "kaiming"):
        raise ValueError(f"init={scheme!r}: use one of gaussian, kaiming")
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for position, (name, layer) in enumerate(layers):
        kaiming = 0.001 if position == len(layers) - 1 else math.sqrt(2 / layer.weight[0].numel())
        _normal(layer.weight, 0.01 if scheme == "gaussian" else kaiming, name, seed)
        if layer.bias is not None:
            one = scheme == "gaussian" and name.rpartition(".")[2] in _ONES
            nn.init.constant_(layer.bias, 1.0 if one else 0.0)


def _normal(weight: Tensor, std: float, name: str, seed: int) -> None:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))


def weights_file(path: str) -> Path:
    """The checkpoint that `path`, a checkpoint or a run folder, names."""
    return Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)


def load_weights(net: nn.Module, path: str) -> None:
    """Copy weights, and nothing else, from a checkpoint or run folder; the last layer may have other classes.

    Raises ValueError where `path` is no checkpoint, or where any other layer is missing in either or has another shape.
    """
    try:
        state = torch.load(weights_file(path), map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"init_from={path}: no readable checkpoint ({reason})") from error
    state = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    own = net.state_dict()
    last = list(own)[-1].rpartition(".")[0]
    wrong = [
        name
        for name in dict.fromkeys((*own, *state))
        if not name.startswith(f"{last}.")
        and (name not in own or name not in state or state[name].shape != own[name].shape)
    ]
    if wrong:
        others = f" ({len(wrong)} in all do not)" if len(wrong) > 1 else ""
        raise ValueError(f"init_from={path}: its {wrong[0]} does not fit this net{others}")
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    net.load_state_dict(fitting, strict=False)
