"""Config → objects: what is refused, and what the numbers are."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from spp_cls import build
from spp_cls.classifier import Classifier
from spp_cls.data import Views
from spp_cls.door import compose, register_resolvers
from spp_cls.jobs import Job
from spp_cls.models import sppnet
from spp_cls.schedules import constant

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


@pytest.mark.parametrize(
    ("annotation", "word_is_wrong"),
    [
        (int, True),
        (float | None, True),
        (Optional[Union[int, float]], True),  # noqa: UP007, UP045  as lightning writes them
        (int | bool, True),
        (int | str, False),
        (list[int], False),
        (bool, False),
        (Literal["norm", "value"], False),
        (inspect.Parameter.empty, False),
    ],
)
def test_a_word_is_refused_where_only_a_number_can_be_meant(
    monkeypatch: pytest.MonkeyPatch, annotation: Any, word_is_wrong: bool
) -> None:
    def takes(x: Any) -> Any:
        return x

    takes.__annotations__["x"] = annotation
    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(takes=takes))

    def made(value: Any) -> Any:
        return build.instantiate(OmegaConf.create({"_target_": "made_up.takes", "x": value}), "here")

    if word_is_wrong:
        with pytest.raises(ValueError, match=r"^here\.x=abc: takes a number$"):
            made("abc")
    else:
        assert made("abc") == "abc"
    assert made(None) is None and made(2) == 2
    unknown = {"a": {"_target_": "made_up.takes", "x": "${hydra:nothing}"}}
    build.check_arguments(OmegaConf.create({"callbacks": unknown}))  # where Hydra does not run


def test_a_word_for_a_limit_of_the_trainer_is_named_before_anything_is_made() -> None:
    config = OmegaConf.create({"trainer": {"_target_": "lightning.pytorch.Trainer", "limit_val_batches": "abc"}})
    with pytest.raises(ValueError, match=r"^trainer\.limit_val_batches=abc: takes a number$"):
        build.check_arguments(config)


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
        "torchvision.models.VGG",
        "torch.nn.Linear",
        "lightning.pytorch.callbacks.EarlyStopping",
        "spp_cls.data.layouts.folder",
    ):
        build.refuse_untrusted({"a": [{"_target_": target}], "b": {"_target": "os.system"}, "c": None}, Path("x"))


def test_nothing_that_is_only_reached_through_a_trusted_package() -> None:
    # spp_cls.build.os.system is os.system under another name.
    for target in (
        "spp_cls.build.os.system",
        "lightning.pytorch.trainer.trainer.os.system",
        "spp_cls.models.sppnet.torch.load",
        "spp_cls.build.load_classifier",
        "lightning.pytorch.cli.instantiate_class",
        "torch.nn.nothing",
        "torch.nn.init.normal_",
        "spp_cls.classifier.Classifier.load_from_checkpoint",  # which could be told to trust
        "spp_cls.data.shapes.draw",
        "torchvision.models._api.WeightsEnum.get_state_dict",  # which unpickles what it downloads
        "torchvision.models.get_model_weights",
        "lightning.pytorch.callbacks.callback.Callback.setup",
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
    classifier = build.load_classifier(run.checkpoint)
    assert not classifier.training
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert classifier.identity["classes"] == ["a", "b", "c"]
    assert classifier.identity["region"] == 32
    assert run.results["epochs"] == 2


def test_a_run_goes_on_only_where_what_it_holds_is_what_is_asked_for(tmp_path: Path) -> None:
    before = {"config": {"seed": 0, "trainer": {"max_epochs": 2}}, "index": "x", "pixels": "files"}
    path = tmp_path / "last.ckpt"
    assert build.differences_from(path, before, before) == []
    longer = {**before, "config": {"seed": 0, "trainer": {"max_epochs": 9}}}
    assert [str(difference) for difference in build.differences_from(path, before, longer)] == [
        "trainer.max_epochs: 2 → 9"
    ]
    with pytest.raises(ValueError, match=f"^ckpt_path={path}: its run has seed=0, here it is 5; go on with the same"):
        build.differences_from(path, before, {"config": {"seed": 5}, "index": "x", "pixels": "files"})


# Checkpoints load alone


def test_a_checkpoint_loads_alone(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spp_cls.door.conf_folder", lambda: 1 / 0)  # nobody asks for the configs
    classifier = Classifier.load_from_checkpoint("mine.ckpt", weights_only=True)
    images = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(classifier(images), build.load_classifier(trained / "checkpoints" / "last.ckpt")(images))
    known = classifier.identity
    assert known["classes"] == ["a", "b", "c"] and (known["region"], known["resize"]) == (32, 36)
    assert len(known["mean"]) == len(known["std"]) == 3
    with pytest.raises(ValueError, match="weights_only=False would run what code is in the file"):
        Classifier.load_from_checkpoint("mine.ckpt", weights_only=False)


def test_a_checkpoint_or_a_pickle_of_somebody_else_runs_nothing(trained: Path, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "theirs.ckpt"

    class Code:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {ran}",)

    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**state, "more": Code()}, path)
    with pytest.raises(ValueError, match=f"{path}: not a readable checkpoint"):
        Classifier.load_from_checkpoint(path)
    state["spp_cls"]["identity"]["config"]["model"] = {"_target_": "os.system", "command": f"touch {ran}"}
    torch.save(state, path)
    for load in (Classifier.load_from_checkpoint, build.load_run):
        with pytest.raises(ValueError, match=f"{path} would build os.system, which is not part of spp_cls; add trust"):
            load(path)
    assert not ran.exists()


def test_a_checkpoint_that_lies_by_itself_is_a_run(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", path)
    run = build.load_run(path)
    assert (run.folder, run.checkpoint) == (tmp_path, path)
    assert run.config == build.load_run(trained).config


# Several ranks


@pytest.mark.parametrize(
    ("env", "devices", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "auto", (2, 2)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2, (2, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, "auto", (4, 2)),
        ({}, "auto", ("auto", 1)),
    ],
)
def test_devices_and_nodes_are_those_that_were_started(
    env: dict[str, str], devices: Any, expected: tuple[Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = build.with_the_ranks_there_are(OmegaConf.create({"devices": devices, "num_nodes": 1}))
    assert (found.devices, found.num_nodes) == expected


def test_other_devices_than_those_that_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    line = "trainer.devices=1, trainer.num_nodes=1: torchrun has started 4 processes on each of 1 machines; use trainer"
    with pytest.raises(ValueError, match=line):
        build.with_the_ranks_there_are(OmegaConf.create({"devices": 1, "num_nodes": 1}))


# Compiling


@pytest.mark.slow
def test_one_graph_a_size_and_none_after_the_first_epoch_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:  # in place of inductor, which needs a C++ compiler
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    net = sppnet("tiny", 3, width=0.1)
    keys = list(net.state_dict())
    build.compile_net(net, None, exact=True, backend=backend)
    assert list(net.state_dict()) == keys
    classifier = Classifier(net, partial(torch.optim.SGD, lr=0.1), constant)
    sizes = [*range(64, 144, 8)]  # more than torch's own limit of 8
    for epoch in range(2):
        for size in sizes:
            classifier.train()
            classifier(torch.randn(2, 3, size, size)).sum().backward()
            classifier.eval()
            with torch.inference_mode():
                classifier(torch.randn(3, 3, size, size))  # testing compiles nothing
        assert graphs == len(sizes), epoch
    torch._dynamo.reset()


def test_kernels_that_are_chosen_by_timing_are_not_exact() -> None:
    with pytest.raises(ValueError, match="compile_mode=max-autotune chooses kernels by timing.*deterministic=false"):
        build.compile_net(torch.nn.Linear(1, 1), "max-autotune", exact=True)
    with pytest.raises(ValueError, match="compile_mode=fast: use default, reduce-overhead, max-autotune"):
        build.compile_net(torch.nn.Linear(1, 1), "fast", exact=False)


def test_steps_that_would_end_inside_an_epoch_are_refused(tmp_path: Path) -> None:
    config = OmegaConf.create({"trainer": {"_target_": "lightning.pytorch.Trainer", "max_steps": 5}})
    with pytest.raises(ValueError, match="^trainer.max_steps=5: ends inside an epoch.*; use trainer.max_epochs"):
        build.build_trainer(config, tmp_path)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"precision": "foo"}, "trainer.precision=foo: use one of 32-true, 16-mixed, bf16-mixed, "),
        ({"precision": 64}, "trainer.precision=64: order and chance need float32; use 32-true, "),
        ({"gradient_clip_val": -1}, "trainer.gradient_clip_val=-1: use a number above 0, or null for no clipping"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches=0: trains nothing; "),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0: use a whole number of at least 1"),
        ({"accelerator": "gpu", "devices": 9}, "trainer.devices=9: 2 GPUs are to be seen here; use at most as many"),
    ],
    ids=str,
)
def test_what_lightning_would_take_for_another_thing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError) as caught:
        build.build_trainer(OmegaConf.create({"trainer": settings}), tmp_path)
    assert str(caught.value).startswith(line)


def test_no_clipping_may_be_written_as_nought(tmp_path: Path) -> None:
    target = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "enable_progress_bar": False}
    for precision in (32, "32-true", "bf16-mixed", None):
        config = OmegaConf.create({"trainer": {**target, "gradient_clip_val": 0, "precision": precision}})
        assert build.build_trainer(config, tmp_path).gradient_clip_val == 0


def test_what_a_run_saves_when_is_named() -> None:
    config = OmegaConf.create({"trainer": {}, "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True}})
    build.check_run(config)
    build.check_run(OmegaConf.merge(config, {"checkpoint": None}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^checkpoint.foo: there is no such key; use every_minutes or every_steps$"):
        build.check_run(OmegaConf.merge(config, {"checkpoint": {"foo": 1}}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("accelerator", "here", "kept"), [("auto", True, False), ("cpu", True, True), ("auto", False, True)]
)
def test_on_mps_kernels_that_are_not_deterministic_warn(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, here: bool, kept: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: here)
    asked: list[Any] = []
    monkeypatch.setattr(build, "instantiate", lambda config, where, **arguments: asked.append(config.deterministic))
    build.build_trainer(OmegaConf.create({"trainer": {"accelerator": accelerator, "deterministic": True}}), None)
    assert asked == [True if kept else "warn"]


# What somebody else's run would do


def test_what_would_become_another_thing_is_refused(trained: Path, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "theirs.ckpt"
    evil = f"${{oc.create:{{_target_: pathlib.Path.touch, self: {ran}}}}}"
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    state["spp_cls"]["identity"]["config"]["classifier"]["label_smoothing"] = evil
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"theirs.ckpt holds '\$\{oc.create.*which is worked out only later; add trust"
    ):
        build.load_classifier(path)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("draft: true", f"draft: '\\{evil}'"))
    with pytest.raises(ValueError, match="which is worked out only later"):
        build.load_run(run)
    assert not ran.exists()


def test_nothing_is_written_outside_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def config(dirpath: str) -> dict[str, Any]:
        return {"callbacks": {"best": {"dirpath": dirpath}}, "logger": {"csv": {"save_dir": str(run)}}, "data": "/data"}

    build.refuse_elsewhere(config(str(run / "checkpoints")), run, run)
    (run / "link").symlink_to(tmp_path)
    monkeypatch.setenv("ELSEWHERE", "/etc")
    outside = (str(tmp_path / "other"), "/etc", f"{run}/../other", str(run / "link" / "other"))
    for elsewhere in (*outside, "checkpoints", "~/x", "$ELSEWHERE/x"):  # relative to the working folder
        with pytest.raises(ValueError, match="would write to .*, outside its run folder; add trust=true"):
            build.refuse_elsewhere(config(elsewhere), run, run)


def test_a_size_costs_no_look_of_hydras(pictures: Path) -> None:
    layout = {"_target_": "spp_cls.data.layouts.folder", "_partial_": True}
    data = {"_target_": "spp_cls.data.MultiSizeDataModule", "root": str(pictures), "layout": layout, "region": 32}
    sizes = {"_target_": "spp_cls.data.sizes.alternating", "_partial_": True, "sizes": [26, 32]}
    views = {"_target_": "spp_cls.data.Views", "crops": "center_crop"}
    made = build.build_datamodule(OmegaConf.create({"data": data, "sizes": sizes, "views": views})).sizes
    assert type(made) is partial and [made(0, epoch, 5) for epoch in range(3)] == [26, 32, 26]


# Jobs


@pytest.fixture
def words(small: list[str]) -> list[str]:
    register_resolvers()
    return [word for word in small if word != "logger=null"]


def job(words: list[str], *more: str) -> Job:
    return build.job_of(build.composed([*words, *more]), (*words, *more), Path("runs/x_{key}"))


def test_a_job_says_where_it_lies_and_what_it_must_be_tested_by(words: list[str]) -> None:
    found = job(words, "views=ten_crop", "tests=[center_crop@28,ten_crop,train/center_crop]", "keep_scores=true")
    assert found.tests == ("ten_crop@32", "center_crop@28", "train/center_crop@32")
    assert found.folder == Path(f"runs/x_{found.key}") and found.settings[: len(words)] == tuple(words)
    assert (found.name, found.scores) == (found.key, True)
    untested = job(words, "test=false", "tests=[ten_crop]", "keep_scores=true")
    assert (untested.tests, untested.scores, untested.key) == ((), False, found.key)


def test_the_key_of_a_job_is_that_of_what_decides_its_result(
    words: list[str], trained: Path, pictures: Path, tmp_path: Path
) -> None:
    key = job(words).key
    assert (trained / "key").read_text() == f"{key}\n"  # a run by hand, with a logger and a folder of its own
    shutil.copytree(pictures, tmp_path / "moved")
    same = (f"data.root={tmp_path / 'moved'}", "logger=csv", "data.num_workers=1", "name=mine", "views=ten_crop")
    assert job(words, *same).key == key
    others = {job(words, other).key for other in ("seed=1", "optimizer.lr=0.5", "model.init_from=a.ckpt")}
    (tmp_path / "moved" / "train" / "a" / "00.jpg").unlink()
    others.add(job(words, same[0]).key)
    assert len({*others, key}) == 5


@pytest.mark.parametrize(
    ("key", "name"), [("model.init_from", "run/checkpoints/last.ckpt"), ("data.mean_image", "m.npy")]
)
def test_a_file_that_a_run_starts_from_is_known_by_its_contents(
    words: list[str], tmp_path: Path, key: str, name: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    named = f"{key}={file.parents[1] if name.startswith('run/') else file}"
    keys = []
    for second, grey in enumerate((1, 2, 1)):
        with file.open("wb") as contents:
            np.save(contents, np.full((32, 32, 3), grey, np.float32))
        os.utime(file, (second, second))
        keys.append(job(words, named).key)
    assert keys[0] == keys[2] != keys[1]


def test_what_is_wrong_with_a_job_is_one_line(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^tests: center_crop@big: write views, views@px or train/views@px"):
        job(words, "tests=[center_crop@big]")
    with pytest.raises(ValueError, match="^modle: there is no such key; did you mean model"):
        job(words, "modle=zf5")


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("val/top1_error", [], None),
        ("val/top1_error_64", ["data.val_sizes=[32,64]"], None),
        ("val/top1_error_64", [], "a run has no such metric; did you mean val/top1_error?"),
        ("train/loss", [], None),
        ("val/f1", [], "a run has no such metric; use one of val/loss, val/top1_error, val/top5_error, train/loss, "),
        ("val/f1", ["+callbacks.mine._target_=mine.F1"], None),  # which may log it
        ("test/loss", ["test=false"], "with test=false there is none"),
    ],
)
def test_a_metric_that_no_run_will_have_is_known_before_training(name: str, words: list[str], line: str | None) -> None:
    register_resolvers()
    config = compose("train", words)
    if line is None:
        build.check_metric("metric", name, config)
    else:
        with pytest.raises(ValueError, match=f"^metric={name}: {re.escape(line)}"):
            build.check_metric("metric", name, config)
