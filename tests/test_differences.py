from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

import spp_cls
from spp_cls.differences import (
    CHANGES,
    HARMLESS,
    REFUSED,
    Difference,
    decides,
    differences,
    machine,
    of_all_ranks,
    run_key,
)

SETTINGS: dict[str, Any] = {
    "name": "a",
    "seed": 0,
    "compile": False,
    "model": {"levels": [6, 3, 2, 1], "init_from": None},
    "data": {"root": "a", "batch_size": 8, "num_workers": 0, "flip": 0.5, "val_sizes": None},
    "sizes": {"_target_": "spp_cls.data.sizes.alternating", "sizes": [180, 224]},
    "optimizer": {"lr": 0.01},
    "schedule": {"_target_": "spp_cls.schedules.cosine"},
    "classifier": {"label_smoothing": 0.0, "bias_lr": 1.0},
    "callbacks": {"best": {"dirpath": "/here", "monitor": "val/top1_error"}},
    "trainer": {"max_epochs": 2, "accumulate_grad_batches": 1, "devices": 1, "enable_progress_bar": True},
    "checkpoint": {"every_minutes": 10},
    "resume": None,
}


def identity(key: str = "name", value: Any = "a", **other: Any) -> dict[str, Any]:
    """That of `SETTINGS` with one of them, or with what stands beside them, another."""
    group, _, name = key.rpartition(".")
    config: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in SETTINGS.items()}
    place = config
    for part in filter(None, group.split(".")):
        place[part] = dict(place[part])
        place = place[part]
    place[name] = value
    return {"config": config, "index": "x", "pixels": "files", "machine": {"torch": "2", "threads": 1}, **other}


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("name", "b", HARMLESS),
        ("data.root", "b", HARMLESS),
        ("data.num_workers", 2, HARMLESS),
        ("model.init_from", "a.ckpt", HARMLESS),
        ("checkpoint.every_minutes", 1, HARMLESS),
        ("callbacks.best.dirpath", "/there", HARMLESS),
        ("trainer.devices", 2, HARMLESS),  # ranks are counted as they are
        ("trainer.enable_progress_bar", False, HARMLESS),
        ("trainer.max_epochs", 9, CHANGES),
        ("trainer.gradient_clip_val", 1.0, CHANGES),
        ("compile", True, CHANGES),
        ("callbacks.ema", {"decay": 0.9}, CHANGES),
        ("callbacks.best.monitor", "val/loss", CHANGES),
        ("classifier.label_smoothing", 0.1, CHANGES),
        ("data.flip", 0.0, CHANGES),
        ("schedule._target_", "spp_cls.schedules.step", CHANGES),
        ("sizes.sizes", [224], CHANGES),
        ("sizes._target_", "spp_cls.data.FullImage", REFUSED),
        ("seed", 5, REFUSED),
        ("model.levels", [3, 1], REFUSED),
        ("data.batch_size", 4, REFUSED),
        ("optimizer.lr", 0.1, REFUSED),
        ("classifier.bias_lr", 2.0, REFUSED),
        ("trainer.accumulate_grad_batches", 2, REFUSED),
        ("trainer.limit_train_batches", 3, REFUSED),
    ],
)
def test_each_setting_is_harmless_or_changes_the_result_or_is_refused(key: str, value: Any, kind: str) -> None:
    (found,) = differences(identity(), identity(key, value))
    assert found.kind == kind
    assert found.key.startswith(key) and found.before != found.now


def test_what_goes_on_as_it_began_differs_in_nothing() -> None:
    assert differences(identity(), identity()) == []
    assert differences(identity(), identity("resume", "auto")) == []


def test_pictures_pixels_and_machine() -> None:
    (pictures,) = differences(identity(), identity(index="y"))
    assert pictures.kind == REFUSED
    assert pictures.refusal.startswith("its run was trained on other pictures than these; give the same")
    (pixels,) = differences(identity(), identity(pixels="jpeg cache"))
    assert pixels.refusal.startswith("its run read files, this one jpeg cache: go on with the same data.cache")
    found = differences(identity(), identity(machine={"torch": "3", "threads": 2}))
    assert found == [Difference("threads", 1, 2, CHANGES), Difference("torch", "2", "3", CHANGES)]
    assert [str(one) for one in found] == ["threads: 1 → 2", "torch: 2 → 3"]


def test_a_refusal_names_the_key_and_both_values() -> None:
    (found,) = differences(identity(), identity("seed", 4))
    assert found.refusal == (
        "its run has seed=0, here it is 4; go on with the same, or take its weights alone, by model.init_from"
    )


def test_the_machine_says_what_bits_depend_on() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    found = machine(trainer)
    assert found["spp_cls"] == spp_cls.__version__
    assert type(found["torch"]) is str and found["torch"] == torch.__version__
    assert (found["device"], found["threads"], found["ranks"]) == ("cpu", torch.get_num_threads(), 1)
    assert platform.machine() in found["processor"]


# The key of a run


def key_with(key: str = "name", value: Any = "a", index: str = "x", pixels: str = "files") -> str:
    return run_key(identity(key, value)["config"], index, pixels)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "b"),
        ("tests", ["ten_crop"]),
        ("keep_scores", True),
        ("data.root", "b"),
        ("data.num_workers", 2),
        ("checkpoint.every_minutes", 1),
        ("callbacks.best.dirpath", "/there"),
        ("trainer.devices", 2),
        ("trainer.enable_progress_bar", False),
        ("resume", "auto"),
        ("ckpt_path", "runs/x"),
        ("data.new", None),  # a setting that is new and does nothing
    ],
)
def test_what_decides_no_result_changes_no_key(key: str, value: Any) -> None:
    assert key_with(key, value) == key_with()
    assert value is None or key in ("resume", "ckpt_path") or not decides(key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("optimizer.lr", 0.02),
        ("model.levels", [6]),
        ("model.init_from", "a.ckpt"),
        ("model.weights", "DEFAULT"),
        ("trainer.limit_test_batches", 2),
        ("data.batch_size", 16),
        ("data.flip", 0.0),
        ("sizes.sizes", [224]),
        ("trainer.max_epochs", 3),
        ("callbacks.ema", {"decay": 0.9}),
        ("compile", True),
    ],
)
def test_what_decides_a_result_changes_the_key(key: str, value: Any) -> None:
    assert decides(key) and key_with(key, value) != key_with()


def test_the_key_is_of_pictures_and_pixels_too_and_of_no_order() -> None:
    keys = {key_with(), key_with(index="y"), key_with(pixels="jpeg cache")}
    assert len(keys) == 3 and all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    assert run_key(dict(reversed(SETTINGS.items())), "x", "files") == key_with()


def test_what_all_ranks_must_have_in_common() -> None:
    def common(key: str, value: Any, folder: str = "/runs/a", **other: Any) -> dict[str, Any]:
        return of_all_ranks(identity(key, value, **other), Path(folder))

    same = common("name", "a")
    assert same["optimizer.lr"] == 0.01 and same["index"] is not None
    for key, value in (
        ("name", "b"),
        ("data.root", "/there"),
        ("data.num_workers", 4),
        ("callbacks.best.dirpath", "/b"),
    ):
        assert common(key, value) == same, key
    for key, value in (("logger", {"wandb": {"group": "g"}}), ("data.cache", "raw"), ("ckpt_path", "/a/last.ckpt")):
        assert common(key, value) == same, key
    for key, value in (("optimizer.lr", 0.02), ("seed", 1), ("test", False), ("views", {"crops": "ten_crop"})):
        assert common(key, value) != same, key
    assert common("name", "a", index="y") != same != common("name", "a", pixels="jpeg cache")
    here, there = ({"path": f"{place}/x"} for place in ("/runs/a", "/mnt/a"))  # mounted elsewhere
    assert common("callbacks.mine", here) == common("callbacks.mine", there, "/mnt/a")
    assert common("callbacks.mine", here) != common("callbacks.mine", there)
