"""`spp train`: train a net and test it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .door import key_of, open_door, typed

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule, Trainer
    from torch import nn

    from .build import Saved, Test
    from .classifier import Classifier
    from .data import MultiSizeDataModule
    from .differences import Difference
    from .results import Row


def train(
    classifier: LightningModule,
    datamodule: LightningDataModule,
    trainer: Trainer,
    ckpt_path: str | Path | None = None,
    test: bool = True,
) -> dict[str, float]:
    """Fit, then test with the last weights; the errors and losses at the end by name (`val/top1_error` …)."""
    trainer.fit(classifier, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is not None and "train/loss" not in trainer.callback_metrics:
        _take_saved_weights(classifier, trainer, ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if test and not trainer.interrupted:
        trainer.test(classifier, datamodule=datamodule, verbose=False)
        metrics.update({name: float(value) for name, value in trainer.callback_metrics.items()})
    return metrics


def _take_saved_weights(classifier: LightningModule, trainer: Trainer, ckpt_path: str | Path) -> None:
    """Where nothing was left to train, the weights of the checkpoint: Lightning leaves those that were not averaged."""
    import torch

    state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    if state["global_step"] == trainer.global_step:
        classifier.load_state_dict(state["state_dict"])


def test(
    classifier: Classifier,
    datamodule: MultiSizeDataModule,
    trainer: Trainer,
    more: Sequence[Test],
    keep: Path | None = None,
) -> list[Row]:
    """What result rows say of the test that `train` has just made, and of those in `more`, which are made here.

    The class probabilities of each image are kept in the folder `keep`, if one is given.
    """
    from .build import Test
    from .evaluate import evaluate, scored
    from .results import result_of_test, save_scores

    rows: list[Row] = []
    for each in (Test(datamodule.views), *more):
        _, labels, scores = (
            evaluate(classifier, datamodule, trainer, each.views, each.split) if rows else scored(classifier)
        )
        rows.append(result_of_test(each.name, labels, scores, classifier.test_seconds))
        if keep is not None and trainer.is_global_zero:
            save_scores(keep, each.name, labels, scores)
    return rows


def check(net: nn.Module, datamodule: MultiSizeDataModule, trainer: Trainer, tests: Sequence[Test] = ()) -> None:
    """Refuse, before anything is written, a batch that does not divide and sizes that region or net do not take."""
    from .build import shapes_asked
    from .cost import check_shapes

    datamodule.trainer = trainer
    plan, limit = datamodule.plan, trainer.limit_train_batches
    limited = limit if isinstance(limit, int) else int(limit * len(plan))
    if limited < len(plan) and limited % plan.accumulation and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"trainer.limit_train_batches={limit} ends inside an optimizer step: it counts micro-batches, "
            f"{plan.accumulation} a step; give a multiple of that"
        )
    assert datamodule.index is not None
    for split in ("val", "test"):
        if datamodule.index.counts[split] < trainer.world_size:
            raise ValueError(
                f"{datamodule.root}: has {datamodule.index.counts[split]} {split} pictures, fewer than the "
                f"{trainer.world_size} devices: use fewer devices, or more {split} pictures"
            )
    planned = datamodule.planned_shapes(max(1, trainer.max_epochs or 1), plan.num_batches)
    shapes = sorted({shape for in_epoch in planned.values() for shape in in_epoch}, key=math.prod)
    for test in tests:
        test.views.check(net)
    check_shapes(net, [("sizes", shapes[0]), ("sizes", shapes[-1]), *shapes_asked(datamodule, tests)])


@dataclass(frozen=True)
class Prepared:
    """A run of which all is known, and nothing written."""

    folder: Path
    config: DictConfig
    resolved: dict[str, Any]
    ckpt_path: Path | None
    saved: Saved | None
    differences: list[Difference]  # of the checkpoint's run from this one
    classifier: Classifier
    datamodule: MultiSizeDataModule
    trainer: Trainer
    key: str
    tests: list[Test]  # to make, after the one that Lightning makes
    made: list[Row]  # that were made of the same weights before


def run(config: DictConfig) -> float | None:
    """Everything that `spp train` does with a config; gives `optimized_metric` for sweepers."""
    from . import dashboards
    from .run import in_training

    it = prepare(config, Path(HydraConfig.get().runtime.output_dir))
    if not it.trainer.is_global_zero:
        _train_and_test(it)
        return None
    it.folder.mkdir(parents=True, exist_ok=True)
    with in_training(it.folder):
        _write_what_begins(it)
        try:
            metrics, tested = _train_and_test(it)
            try:
                if not it.trainer.interrupted:
                    _show(it.folder, it.trainer, {**metrics, "tests": tested}, it.resolved)
            except Exception:  # what is the dashboard's trouble shall not cost the results
                _write_what_came_out(it, metrics, tested)
                raise
        finally:
            dashboards.close(it.trainer.loggers)
        return _write_what_came_out(it, metrics, tested)


def prepare(config: DictConfig, folder: Path) -> Prepared:
    """Build all that the run of `config` needs; raises ValueError for what can be known to go wrong."""
    from . import build
    from .differences import of_all_ranks
    from .ranks import place, refuse_different
    from .run import find_checkpoint, holds_a_run

    if config.get("hparams_search"):
        choice = HydraConfig.get().runtime.choices["hparams_search"]
        raise ValueError(f"hparams_search={choice} is a space: run it by spp sweep hparams_search={choice}")
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    ckpt_path = find_checkpoint(config.ckpt_path) if config.ckpt_path else None
    if not ckpt_path and place().rank == 0 and holds_a_run(folder):
        raise ValueError(
            f"hydra.run.dir={folder}: a run lies there; go on with it by ckpt_path={folder}, or name another"
        )
    if ckpt_path and not config.trust:  # before anything that it names is even imported
        build.refuse_untrusted(resolved, ckpt_path)
        build.refuse_elsewhere(resolved, folder, ckpt_path)
    asked = config
    config = OmegaConf.create(resolved)  # what was looked at, and no interpolation that may yet give another thing
    build.check_run(config)
    if config.optimized_metric:
        build.check_metric("optimized_metric", str(config.optimized_metric), config)
    if config.resume not in (None, "auto"):
        raise ValueError(f"resume={config.resume}: use auto or null; a run by its folder is ckpt_path=RUN")
    tests = build.tests_of(config.tests, config.data.region)
    saved = build.read_saved(ckpt_path) if ckpt_path else None
    if saved:
        before = {"config": saved.identity["config"]}
        build.differences_from(saved.checkpoint, before, {"config": resolved})  # before pictures are looked for
        build.refuse_to_go_back(saved, config)
    datamodule = build.build_datamodule(config)
    trainer = build.build_trainer(config, folder)
    identity = build.identity(config, datamodule, trainer)
    found: list[Difference] = []
    if saved:
        found = build.differences_from(saved.checkpoint, saved.identity, identity)
        build.stop_again_only_as_before(trainer, found)
        if "init_from" in config.model:
            config.model.init_from = None  # the checkpoint has the weights
    classifier = build.build_classifier(config, identity, build.class_weights(config, datamodule))
    first = build.Test(datamodule.sized(datamodule.views))
    check(classifier.net, datamodule, trainer, (first, *tests) if config.test else ())
    if place().started_by in ("torchrun", "SLURM"):  # which start all ranks at once; of Lightning's see SameRun
        trainer.strategy.setup_environment()
        refuse_different(of_all_ranks(identity, folder))
    _ = datamodule.pictures  # a cache that is wanted is made here, before other ranks are started
    key = _key_of_what_goes_on(folder, saved, resolved) if saved else build.key_of(asked, datamodule)
    made = _made_before(folder, key) if key and saved else []
    there = _with_scores(folder, made) if config.keep_scores else made
    names = {first.name, *(one["test"] for one in there)}
    left = list({test.name: test for test in tests if test.name not in names}.values())
    return Prepared(folder, config, resolved, ckpt_path, saved, found, classifier, datamodule, trainer, key, left, made)


def _key_of_what_goes_on(folder: Path, saved: Saved, resolved: dict[str, Any]) -> str:
    """The key that the run of `folder` has had; none where it goes on otherwise, and is no run of either setting."""
    from .differences import deciding
    from .run import read_key

    return read_key(folder) if deciding(saved.identity["config"]) == deciding(resolved) else ""


def _made_before(folder: Path, key: str) -> list[Row]:
    """The tests of a run that is finished, if its settings are these."""
    from .results import read_results

    before = read_results(folder)
    return list(before.get("tests", [])) if before.get("key") == key else []


def _with_scores(folder: Path, tests: list[Row]) -> list[Row]:
    from .results import SCORES, scores_path

    return [one for one in tests if scores_path(folder / SCORES, one["test"]).is_file()]


def _train_and_test(it: Prepared) -> tuple[dict[str, float], list[Row]]:
    """Metrics by name, and all tests of these weights."""
    from . import dashboards
    from .results import SCORES

    metrics = train(it.classifier, it.datamodule, it.trainer, it.ckpt_path, it.config.test)
    if not it.config.test or it.trainer.interrupted:
        return metrics, it.made
    if it.trainer.is_global_zero and dashboards.shows_tests(it.trainer.loggers):
        _keep_test(it.folder, it.classifier, it.datamodule, it.trainer)
    keep = it.folder / SCORES if it.config.keep_scores else None
    tested = test(it.classifier, it.datamodule, it.trainer, it.tests, keep)
    names = {one["test"] for one in tested}
    return metrics, [*tested, *(one for one in it.made if one["test"] not in names)]


def _keep_test(folder: Path, classifier: Classifier, datamodule: MultiSizeDataModule, trainer: Trainer) -> None:
    """Of the test that was made last what dashboards show."""
    from .dashboards import media
    from .evaluate import confusion_matrix, per_class, scored
    from .media import keep_test

    rows, labels, scores = scored(classifier)
    assert datamodule.index is not None
    matrix = confusion_matrix(labels, scores)
    table = per_class(matrix, datamodule.classes)
    number, step = media(trainer.loggers), trainer.global_step
    keep_test(folder, datamodule.index, rows, labels, scores, matrix, table, number, step)


def _show(folder: Path, trainer: Trainer, results: dict[str, Any], config: dict[str, Any]) -> None:
    """What the run came to, on its dashboards."""
    from . import dashboards
    from .going_on import chosen, trained_with
    from .resume import read_history

    if not dashboards.shows_tests(trainer.loggers):
        return
    words = trained_with()
    errors = dashboards.errors_of(results)
    dashboards.end(trainer.loggers, folder, read_history(folder), errors, config, chosen(words))


def _write_what_begins(it: Prepared) -> None:
    """What a run folder has before the first step."""
    from .differences import machine
    from .going_on import OVERRIDES, settings
    from .run import KEY, environment
    from .whole import write_json, write_whole

    index, folder = it.datamodule.index, it.folder
    assert index is not None
    config = OmegaConf.to_yaml(OmegaConf.create(it.resolved))
    write_whole(folder / "config.yaml", config)
    left_out = {bad.path: bad.reason for bad in index.bad}
    about, device = environment(typed(), config, index.digest), machine(it.trainer)["device"]
    about |= {"device": about["processor"] if device == "cpu" else device, "left_out": left_out}
    write_json(folder / "environment.json", about)
    if settings():
        write_whole(folder / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(settings())))
    parameters = sum(p.numel() for p in it.classifier.net.parameters())
    print(f"{index.describe()}\nnet: {parameters:,} parameters\nrun: {folder}", file=sys.stderr)
    write_whole(folder / KEY, f"{it.key}\n")
    if it.saved:
        _say_what_differs(folder, it.saved, it.differences)


def _write_what_came_out(it: Prepared, metrics: dict[str, float], tested: list[Row]) -> float | None:
    from .differences import decides
    from .going_on import trained_with
    from .run import RESULTS
    from .whole import write_json

    epochs = it.trainer.fit_loop.epoch_progress.current.completed
    if it.saved and it.saved.step == it.trainer.global_step:
        print(
            f"nothing was left to train: {epochs} epochs are done; go further with trainer.max_epochs=…",
            file=sys.stderr,
        )
    metrics = {**_last_values(it.folder), **metrics}  # of a validation before this epoch, or before it went on
    words = trained_with()
    deciding = [word for word in words if decides(key_of(word))]
    about = {"seed": it.config.seed, "settings": deciding, "epochs": epochs}
    write_json(it.folder / RESULTS, {**about, **metrics, "key": it.key, "tests": tested})
    _say_where(it.folder, metrics, it.config)
    for test in tested[1:]:
        print(f"test error ({test['test']}): top-1 {test['top1_error']:.2f} %")
    name = it.config.optimized_metric
    if name and name not in metrics and not it.config.trainer.fast_dev_run:
        if not any(known.startswith("val/") for known in metrics):
            return None  # it ended before the first validation
        raise ValueError(f"optimized_metric={name}: no such metric; there are {', '.join(sorted(metrics))}")
    return metrics.get(name) if name else None


def _say_what_differs(folder: Path, saved: Saved, found: list[Difference]) -> None:
    from .differences import CHANGES
    from .run import note_event

    print(f"goes on after step {saved.step}, with {saved.epochs} epochs done", file=sys.stderr)
    changes = [difference for difference in found if difference.kind == CHANGES]
    if changes:
        lines = "\n  ".join(map(str, changes))
        print(f"otherwise than it began, so that the result will be another:\n  {lines}", file=sys.stderr)
    kinds: dict[str, dict[str, Any]] = {}
    for difference in found:
        kinds.setdefault(difference.kind, {})[difference.key] = [difference.before, difference.now]
    note_event(folder, "resumed", checkpoint=saved.checkpoint.resolve(), step=saved.step, command=typed(), **kinds)


def _last_values(folder: Path) -> dict[str, float]:
    """The latest of each mean and error in the history."""
    from .resume import read_history

    found: dict[str, float] = {}
    for row in read_history(folder):
        found.update({name: value for name, value in row.items() if "/" in name})
    return found


def _say_where(folder: Path, metrics: dict[str, Any], config: DictConfig) -> None:
    if "test/top1_error" in metrics:
        top5 = f", top-5 {metrics['test/top5_error']:.2f} %" if metrics["test/top5_error"] else ""
        print(f"test error ({config.views.crops}): top-1 {metrics['test/top1_error']:.2f} %{top5}")
    print(f"all of it: {folder}")
    if (folder / "tensorboard").is_dir():
        print(f"look:      tensorboard --logdir {folder.parent}")
    if (folder / "checkpoints").is_dir():
        print(f"test more: spp evaluate run={folder} views=ten_crop")
        print(f"use it:    spp predict run={folder} PICTURE…")


def main(arguments: list[str] | None = None) -> None:
    """The door."""
    open_door("train", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
