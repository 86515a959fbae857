"""`spp <verb> key=value …`, the same as `python -m spp_cls <verb> …`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from . import __version__

# Each verb is a module of this package with a function `main(arguments)`.
VERBS = {
    "train": "train a net and test it",
    "evaluate": "test one run, or several averaged, by centre crop, ten crops or full images",
    "predict": "class and probability of pictures",
    "export": "one file of a run for every image size: ONNX, torch.export or AOTInductor",
    "plan": "print what a training run would do and cost, and what would limit it here",
    "check": "read every file of a data set, and say what is in it and what is wrong with it",
    "table": "a table of the paper: run what it needs, write it with its intervals",
    "sweep": "look for good settings: trials of a space, by Optuna's samplers and pruners",
    "runs": "list runs: state, errors, cost, and in which settings they differ",
    "report": "one HTML page of a run, or of many: curves, errors, mistakes, what mattered",
    "log": "write the dashboard of runs anew from their histories: TensorBoard, Weights & Biases, CSV",
    "cache": "keep training pictures decoded and resized, so that no epoch does it again",
}

HELP = (
    f"""spp {__version__}: image classifiers that take any image size (SPP-net, He et al. 2014)

usage: spp VERB [key=value …]

"""
    + "\n".join(f"  {verb:<10}{what}" for verb, what in VERBS.items())
    + """

start here
  spp train                                     the built-in pictures, a tiny net, 180 and 224 px in turn
  spp check PICTURES                            what is in a folder of pictures, and what is wrong with it
  spp train data=folder data.root=PICTURES      your own: PICTURES/<class>/*.jpg, of any sizes
  spp train experiment=table2c_multi_size model=zf5 data=caltech101
  spp evaluate run=runs/shapes-tiny/…  views=ten_crop
  spp predict run=runs/shapes-tiny/…  PICTURE…

  spp VERB --help            its settings and their choices
  spp VERB --cfg job         the whole config that a command line gives
"""
)


def main(arguments: list[str] | None = None) -> None:
    """Find the verb, and run its module."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "-sc" in arguments and arguments[0] not in VERBS:  # tab completion calls the bare program
        words = os.environ.get("COMP_LINE", "").split()
        verb = words[1] if len(words) > 1 and words[1] in VERBS else "train"
        os.environ["COMP_LINE"] = os.environ.get("COMP_LINE", "").replace(f" {verb}", "", 1)
        arguments = [verb, *arguments]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] in ("--version", "version"):
        print(f"spp {__version__}")
        return
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean spp {near[0]}?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"spp: there is no verb {verb!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    try:
        importlib.import_module(f"spp_cls.{verb}").main(rest)
    except KeyboardInterrupt:  # where nothing is lost: training answers for itself
        print(f"spp {verb}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
