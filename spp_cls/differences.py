"""What differs between the run that wrote a checkpoint and the command that goes on from it, and what comes of it."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from . import __version__
from .run import digest, flat, processor

HARMLESS, CHANGES, REFUSED = "harmless", "changes the result", "refused"

# What a difference in a setting does; the longest key that a setting lies under decides. Refused is what the checkpoint
# holds already, so that another value would be ignored, or what its position is counted in.
KINDS = {
    "": CHANGES,
    "keep_scores": HARMLESS,
    **dict.fromkeys(("name", "tags", "test", "tests", "views", "logger", "checkpoint", "optimized_metric"), HARMLESS),
    **dict.fromkeys(("model", "data", "optimizer", "classifier", "seed", "init"), REFUSED),
    **dict.fromkeys(("model.init_from", "model.weights"), HARMLESS),
    # The index, the pixels and the mean image are compared themselves.
    **dict.fromkeys(("data.root", "data.num_workers", "data.on_bad", "data.max_bad"), HARMLESS),
    **dict.fromkeys(("data.cache", "data.cache_folder"), HARMLESS),
    **dict.fromkeys(("data.val_sizes", "data.flip", "data.colour", "data.place"), CHANGES),
    **dict.fromkeys(("classifier.label_smoothing", "classifier.class_weights"), CHANGES),
    **dict.fromkeys(("trainer.accumulate_grad_batches", "trainer.limit_train_batches"), REFUSED),
    "trainer.overfit_batches": REFUSED,
    "callbacks.best.dirpath": HARMLESS,  # the run folder, which may have been moved
    # Devices and ranks are compared as they are, not as they were asked for.
    **dict.fromkeys(("trainer.accelerator", "trainer.devices", "trainer.num_nodes"), HARMLESS),
    **dict.fromkeys(("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler"), HARMLESS),
    **dict.fromkeys(("trainer.limit_test_batches", "trainer.limit_predict_batches"), HARMLESS),
    **dict.fromkeys(("trainer.log_every_n_steps", "trainer.num_sanity_val_steps"), HARMLESS),
}


OF_THE_COMMAND = ("ckpt_path", "resume", "trust")  # by nature others when a run goes on
# Harmless to a run that goes on, but ranks that differed in it would wait for each other.
TOGETHER = ("test", "tests", "views", "trainer.limit_test_batches", "trainer.num_sanity_val_steps")
# A result, but not how a run goes on: its checkpoint has the weights, and tests come after.
DECIDE = ("model.init_from", "model.weights", "trainer.limit_test_batches")


@dataclass(frozen=True)
class Difference:
    """One thing that was `before` in the run and is `now` in the command; `kind` says what comes of it."""

    key: str
    before: Any
    now: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.now}"

    @property
    def refusal(self) -> str:
        """Why a run cannot go on with this, and what would be right."""
        alone = "or take its weights alone, by model.init_from"
        if self.key == "index":
            return f"its run was trained on other pictures than these; give the same, {alone}"
        if self.key == "pixels":
            return (
                f"its run read {self.before or 'files'}, this one {self.now}: go on with the same data.cache; "
                "raw and null give the same pixels"
            )
        if self.key == "mean_image":
            return f"its run has another data.mean_image than this one; give the same, {alone}"
        return f"its run has {self.key}={self.before}, here it is {self.now}; go on with the same, {alone}"


def machine(trainer: Trainer) -> dict[str, Any]:
    """What the bits of a result depend on beside the config: versions, the device, threads and ranks."""
    device = trainer.strategy.root_device
    return {
        "spp_cls": __version__,
        "torch": str(torch.__version__),  # a plain str: no checkpoint holds a TorchVersion
        "lightning": metadata.version("lightning"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {processor()}",
        "threads": torch.get_num_threads(),
        "ranks": trainer.world_size,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """What differs between two identities (see `build.identity`), sorted by key."""
    found = []
    for key in ("index", "pixels", "mean_image"):
        if before.get(key) != now.get(key):
            found.append(Difference(key, before.get(key), now.get(key), REFUSED))
    was, is_ = (dict(flat(identity.get("config", {}))) for identity in (before, now))
    for key in sorted({*was, *is_}):
        if was.get(key) != is_.get(key) and key not in OF_THE_COMMAND:
            found.append(Difference(key, was.get(key), is_.get(key), _kind(key, was, is_)))
    ran, runs = (identity.get("machine", {}) for identity in (before, now))
    for key in sorted({*ran, *runs}):
        if ran.get(key) != runs.get(key):
            found.append(Difference(key, ran.get(key), runs.get(key), CHANGES))
    return found


def run_key(config: dict[str, Any], index: str, pixels: str) -> str:
    """A hash of what decides a run's result, whoever starts it, wherever: 16 hex digits.

    `config` is as in an identity, less what depends on the run's folder; `index` and `pixels` as there. What is null is
    left out, so that a setting that is new and does nothing changes no key.
    """
    return digest(json.dumps([sorted(deciding(config).items()), index, pixels], default=str))


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config, by dotted key, that have a part in a run's result and are not null."""
    given = {key: value for key, value in flat(config) if value is not None and key not in OF_THE_COMMAND}
    return {key: value for key, value in given.items() if decides(key)}


def of_all_ranks(identity: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of an identity what all ranks of a run must have in common; `folder` is the run's, which may lie elsewhere."""
    given = {key: value for key, value in flat(identity.get("config", {})) if value is not None}
    settings = {key: value for key, value in given.items() if _is_of_all(key) and key not in OF_THE_COMMAND}
    home = str(folder.absolute())
    settings = {k: v.replace(home, "", 1) if isinstance(v, str) else v for k, v in settings.items()}
    return {**settings, **{key: identity.get(key) for key in ("index", "pixels", "mean_image")}}


def _is_of_all(key: str) -> bool:
    return decides(key) or any(key == each or key.startswith(f"{each}.") for each in TOGETHER)


def decides(key: str) -> bool:
    """Whether the setting `key` has a part in a run's result."""
    return key in DECIDE or _kind(key) != HARMLESS


def _kind(key: str, *configs: dict[str, Any]) -> str:
    # Whole pictures fall into batches of their own, in which the position is counted.
    if key.startswith("sizes") and any("FullImage" in str(config.get("sizes._target_")) for config in configs):
        return REFUSED
    while key not in KINDS:
        key = key.rpartition(".")[0]
    return KINDS[key]
