"""`spp export`: a run as one file for every image size, with its preprocessing and class names inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from . import __version__
from .door import check_file, check_number, open_door

if TYPE_CHECKING:
    from torch import nn

    from .classifier import Classifier
    from .run import Run


def about(run: Run, classifier: Classifier, smallest: int, largest: int) -> dict[str, Any]:
    """What the file says of itself: plain data for JSON."""
    known, views = classifier.identity, run.config["views"]
    results = run.results if run.checkpoint.name == "last.ckpt" else {}  # they are of the last weights
    return {
        "spp_cls": __version__,
        "classes": known["classes"],
        "mean": known["mean"],  # in grey levels; the graph subtracts it, and divides by std
        "std": known["std"],
        "resize": known["resize"],  # px of the shorter side before a centre crop of `region`
        "region": known["region"],
        "views": {"crops": views["crops"], "size": views["size"] or known["region"]},  # how the run was tested
        "smallest_size": smallest,  # px of a side
        "largest_size": largest,
        "results": {name: value for name, value in results.items() if name.startswith(("val/", "test/"))},
    }


def limits(net: nn.Module, smallest: int | None, largest: int) -> tuple[int, int]:
    """Smallest and largest side in px that a file of `net` shall take; without `smallest`, what its backbone takes."""
    from .models import SPPNet

    least = net.smallest_size() if isinstance(net, SPPNet) else 1
    if smallest is None and not isinstance(net, SPPNet):
        raise ValueError("smallest=null: it is not known of a net of your own; give px, like smallest=64")
    smallest = least if smallest is None else smallest
    if smallest < least:
        raise ValueError(f"smallest={smallest}: the net takes sides of {least} px or more")
    if largest < smallest + 32:
        raise ValueError(f"largest={largest}: give {smallest + 32} px or more; the smallest side is {smallest}")
    return smallest, largest


def run(config: DictConfig) -> None:
    """Everything that `spp export` does with a config."""
    from . import build, portable

    portable.check_format(config.format)
    check_file("output", config.output)
    check_number("smallest", config.smallest)
    check_number("largest", config.largest)
    suffix = portable.SUFFIXES[config.format]
    ending = f".{suffix.rpartition('.')[2]}"
    if config.output and not config.output.endswith(ending):
        raise ValueError(f"output={config.output}: format={config.format} is a file *{ending}")
    found = build.load_run(config.run, config.ckpt, config.trust)
    classifier = build.load_classifier(found.checkpoint, config.trust)
    rule = getattr(getattr(classifier.net, "pyramid", None), "bins", None)
    if rule is not None:
        raise ValueError(
            f"model.bins={rule.__name__}: rules for study have no form for all sizes; none can be exported"
        )
    if classifier.identity.get("mean_image"):
        raise ValueError("data.mean_image: a file would have to warp it to every size; train with data.mean to export")
    smallest, largest = limits(classifier.net, config.smallest, config.largest)
    path = Path(config.output or found.folder / "exports" / f"{found.checkpoint.stem}{suffix}")
    described = about(found, classifier, smallest, largest)
    agreement = portable.write(classifier.net, path, config.format, described, config.tolerance)
    print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, sides of {smallest} to {largest} px, at most "
        f"{agreement.difference:.0e} of the largest logit from the net"
    )


def main(arguments: list[str] | None = None) -> None:
    """The door."""
    open_door("export", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
