"""Config → objects: what is refused, and what the numbers are."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from spp_cls import build
from spp_cls.data import Views

SGD = {"_target_": "torch.optim.SGD", "_partial_": True}


# Building


def test_what_a_config_names_is_made() -> None:
    assert build.instantiate(
        OmegaConf.create({"_target_": "spp_cls.data.Views", "crops": "ten_crop"}), "views"
    ) == Views("ten_crop")
    single = {"_target_": "spp_cls.data.sizes.single", "_partial_": True, "size": 32}
    made = build.instantiate(OmegaConf.create(single), "sizes")
    assert isinstance(made, partial) and made(0, 0, 0) == 32


def test_objects_are_given_as_they_are() -> None:
    given = {"a": [1, 2], "b": torch.nn.Linear(1, 1)}
    config = OmegaConf.create({"_target_": "types.SimpleNamespace", "c": [3]})
    made = build.instantiate(config, "x", **given)
    assert isinstance(made, SimpleNamespace)
    assert made.a is given["a"] and made.b is given["b"] and made.c == [3] and type(made.c) is list


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"_target_": "spp_cls.data.Views", "crop": "ten_crop"},
            "views.crop: .* has no such argument; did you mean crops?",
        ),
        ({"_target_": "spp_cls.data.Views", "crops": "???"}, "crops has no value: give one"),
        ({"_target_": "spp_cls.data.Vews", "crops": "x"}, "views._target_=spp_cls.data.Vews: cannot be imported"),
        ({"_target_": "nothere.Views"}, "views._target_=nothere.Views: cannot be imported"),
        ({"_target_": "spp_cls.data.Views", "crops": "x"}, "^views.crops='x': use one of center_crop"),
        ({"_target_": "spp_cls.data.Views"}, "views: .*missing 1 required positional argument: 'crops'"),
        (
            {"_target_": "spp_cls.data.Views", "crops": {**SGD, "lrs": 1}},
            "views.crops.lrs: .* no such argument; did you",
        ),
    ],
)
def test_what_is_wrong_is_one_line(config: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        build.instantiate(OmegaConf.create(config), "views")
    assert "\n" not in str(caught.value)


def test_every_group_is_looked_at_before_anything_is_made() -> None:
    good = {"optimizer": SGD, "callbacks": {"a": None}, "logger": None}
    build.check_arguments(OmegaConf.create(good))
    for group, key in (
        ("optimizer", "optimizer.lrs"),
        ("callbacks", "callbacks.mine.lrs"),
        ("logger", "logger.mine.lrs"),
    ):
        wrong: Any = {**SGD, "lrs": 1}
        with pytest.raises(ValueError, match=f"^{key}: torch.optim.SGD has no such argument; did you mean lr?"):
            build.check_arguments(OmegaConf.create({group: wrong if group == "optimizer" else {"mine": wrong}}))


# Class weights


def index_of(*labels: int) -> Any:
    index = SimpleNamespace(labels=np.array(labels), classes=("a", "b", "c"), rows=lambda split: np.arange(len(labels)))
    return SimpleNamespace(index=index)


def weights_of(chosen: Any, *labels: int) -> list[float] | None:
    config = OmegaConf.create({"classifier": {"class_weights": chosen}})
    return build.class_weights(config, index_of(*labels))


def test_balanced_weights_by_hand() -> None:
    # 6 pictures, 3 classes of 3, 2 and 1: 6 / (3 · 3), 6 / (3 · 2), 6 / (3 · 1).
    assert weights_of("balanced", 0, 0, 0, 1, 1, 2) == pytest.approx([2 / 3, 1, 2])
    assert weights_of("balanced", 0, 1, 2) == [1, 1, 1]


def test_weights_as_given() -> None:
    assert weights_of(None, 0) is None
    assert weights_of([1, 2, 0.5], 0) == [1.0, 2.0, 0.5]
    with pytest.raises(ValueError, match="classifier.class_weights=blanced: give a list .* or balanced, or null"):
        weights_of("blanced", 0)


def test_as_many_weights_as_classes() -> None:
    with pytest.raises(ValueError, match="class_weights has 2 numbers for 3 classes"):
        build.build_classifier(OmegaConf.create({}), {"classes": ["a", "b", "c"], "val_sizes": [32]}, [1.0, 2.0])


# What is not there


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_device_that_is_not_there_is_named(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    config = OmegaConf.create({"trainer": {"accelerator": accelerator}})
    with pytest.raises(ValueError, match=f"trainer.accelerator={accelerator}: no .* here; use trainer=cpu"):
        build.build_trainer(config, None)


def test_a_key_of_weights_and_biases_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not build._has_wandb_key()
    (tmp_path / "netrc").write_text("machine example.org login a password b\n")
    assert not build._has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert build._has_wandb_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert build._has_wandb_key()


# What others hand us


@pytest.mark.parametrize(
    "config",
    [
        {"_target_": "os.system", "command": "true"},
        {"model": {"_target_": "os.system"}},
        {"data": {"layout": {"_target_": "subprocess.run", "_partial_": True}}},
        {"callbacks": {"a": [1, {"b": [{"_target_": "builtins.eval"}]}]}},
        {"model": {"_target_": "torch.hub.load", "repo_or_dir": "evil/repo"}},
        {"model": {"_target_": "torch.load", "f": "evil.pt"}},
        {"model": {"_target_": "spp_clsevil.Net"}},
        {"model": {"_target_": "hydra.utils.get_method"}},
        {"model": {"_target_": 7}},
        {"model": {"_target_": ["spp_cls.models.sppnet"]}},
    ],
)
def test_what_is_not_ours_is_refused_wherever_it_stands(config: Any) -> None:
    with pytest.raises(
        ValueError, match="run/config.yaml would build .*, which is not part of spp_cls; add trust=true"
    ):
        build.refuse_untrusted(config, Path("run/config.yaml"))


def test_what_is_ours_is_not() -> None:
    for target in (
        "spp_cls.models.sppnet",
        "torch.optim.AdamW",
        "lightning.pytorch.Trainer",
        "torchvision.models.vgg11",
    ):
        build.refuse_untrusted({"a": [{"_target_": target}], "b": {"_target": "os.system"}, "c": None}, Path("x"))


def test_nothing_that_is_only_reached_through_a_trusted_package() -> None:
    # spp_cls.build.os.system is os.system under another name.
    for target in (
        "spp_cls.build.os.system",
        "lightning.pytorch.trainer.trainer.os.system",
        "spp_cls.models.sppnet.torch.load",
        "spp_cls.build.restore_classifier",
        "lightning.pytorch.cli.instantiate_class",
        "torch.nn.nothing",
    ):
        with pytest.raises(ValueError, match="which is not part of spp_cls"):
            build.refuse_untrusted({"_target_": target}, Path("x"))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    evil, ran = tmp_path / "evil.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {}, "spp_cls": Evil(ran)}, evil)
    with pytest.raises(ValueError, match="evil.ckpt: not a readable checkpoint"):
        build.read_checkpoint(evil)
    evil.write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(ValueError, match="evil.ckpt: not a readable checkpoint"):
        build.read_checkpoint(evil)
    assert not ran.exists()


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path: Path, trained: Path) -> None:
    path = tmp_path / "a.ckpt"
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    for content in (b"", b"weights of mine", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.ckpt: not a readable checkpoint") as caught:
            build.read_checkpoint(path)
        assert "\n" not in str(caught.value)
    for other in ({"state_dict": {}}, [1, 2], torch.zeros(1)):
        torch.save(other, path)
        with pytest.raises(ValueError, match="a.ckpt: not a checkpoint of spp_cls; name one that spp train wrote"):
            build.read_checkpoint(path)
    with pytest.raises(ValueError, match="nope.ckpt: not a readable checkpoint"):
        build.read_checkpoint(tmp_path / "nope.ckpt")


def test_a_run_is_restored_with_its_weights_in_eval_mode(trained: Path) -> None:
    run = build.load_run(trained)
    classifier = build.restore_classifier(run)
    assert not classifier.training
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert classifier.identity["classes"] == ["a", "b", "c"]
    assert classifier.identity["region"] == 32
    assert run.results["epochs"] == 2


def test_a_run_goes_on_only_with_the_pictures_and_settings_that_decide_what_is_learnt(tmp_path: Path) -> None:
    settings = {
        "seed": 0,
        "model": {"levels": [6, 3, 2, 1], "init_from": None},
        "data": {"root": "a", "batch_size": 8, "num_workers": 0},
        "trainer": {"max_epochs": 2, "accumulate_grad_batches": 1},
    }

    def identity(index: str = "x", **changes: Any) -> dict[str, Any]:
        config = {
            key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value
            for key, value in settings.items()
        }
        pixels = changes.get("pixels", "files")
        return {"config": {**config, "seed": changes.get("seed", 0)}, "index": index, "pixels": pixels}

    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "spp_cls": {"identity": identity()}}, path)
    build.refuse_to_go_on(path, identity(data={"root": "b", "num_workers": 2}, trainer={"max_epochs": 9}))
    for other, line in (
        (identity("y"), "its run was trained on other pictures than these"),
        (identity(pixels="jpeg cache"), "its run read files, this one jpeg cache: go on with the same data.cache"),
        (identity(seed=5), "its run has seed=0, here it is 5"),
        (identity(model={"levels": [3, 1]}), r"its run has model.levels=\[6, 3, 2, 1\], here it is \[3, 1\]"),
        (identity(data={"batch_size": 4}), "its run has data.batch_size=8, here it is 4"),
        (
            identity(trainer={"accumulate_grad_batches": 2}),
            "its run has trainer.accumulate_grad_batches=1, here it is 2",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            build.refuse_to_go_on(path, other)
