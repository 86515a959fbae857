"""Dashboards that follow the history: each line of it once, however often a run was killed and gone on with."""

from __future__ import annotations

import glob
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import nn
from tqdm import tqdm

from .media import LastTest, draw_confusion, draw_mistakes, encoded, first_batch, read_test
from .run import CHECKPOINTS, flat
from .whole import write_whole

Row = dict[str, Any]  # a line of history.jsonl
LONG = 5000  # rows that take long enough for a progress bar
CHART = 100  # classes that a chart of W&B's takes; the confusion of more is a picture
CONFUSIONS = 1000  # rows of the table of what is taken for what
# What is compared between runs: settings under these keys, and those that were typed.
HYPERPARAMETERS = (
    *("seed", "init", "model", "optimizer", "schedule", "sizes", "classifier", "data.root", "data.batch_size"),
    *("data.region", "data.resize", "data.place", "data.flip", "data.colour", "trainer.max_epochs"),
    *("trainer.precision", "trainer.gradient_clip_val", "trainer.accumulate_grad_batches"),
)
ARTIFACTS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "last": ("last",),
    "best": ("best",),
    "all": ("best", "last"),  # the newest version is the latest, by W&B's rule
}


@dataclass(frozen=True)
class Options:
    """What `conf/logger/` has for a logger that its class knows nothing of.

    Args:
        media: pictures of the test that are shown, half of them mistakes; 0 also leaves out the first batch.
        artifacts: which checkpoints are kept by W&B, with what they come of and what came of them.
        watch: what W&B draws of the net: gradients, all (weights too), or None.
        alert: whether W&B tells its user when the run has ended.
    """

    media: int = 64
    artifacts: str | None = None
    watch: str | None = None
    alert: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.media, bool) or not isinstance(self.media, int) or self.media < 0:
            raise ValueError(f"media={self.media}: use a whole number of pictures, or 0 for none")
        if self.artifacts not in ARTIFACTS:
            raise ValueError(f"artifacts={self.artifacts}: use last, best, all or null")
        if self.watch not in (None, "gradients", "all"):
            raise ValueError(f"watch={self.watch}: use gradients, all or null")
        if not isinstance(self.alert, bool):
            raise ValueError(f"alert={self.alert}: use true or false")


# The keys of a logger's config that are options, by the name of its class.
OPTIONS = {"WandbLogger": tuple(field.name for field in fields(Options)), "TensorBoardLogger": ("media",)}
NOTHING = Options(media=0)  # of a logger that was made without


def options(logger: Logger) -> Options:
    """The options that `logger` was built with."""
    found = getattr(logger, "options", NOTHING)
    return found if isinstance(found, Options) else NOTHING


def media(loggers: Sequence[Logger]) -> int:
    """How many pictures of the test are wanted."""
    return max((options(logger).media for logger in loggers), default=0)


def shows_tests(loggers: Sequence[Logger]) -> bool:
    """Whether one of `loggers` shows tables or pictures of the test."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger) for logger in loggers)


def shown(row: Row) -> dict[str, float]:
    """The values of `row` by the names that dashboards show; the mean of an epoch is no point on the steps' curve."""
    values = {k if "/" in k else f"train/{k}": v for k, v in row.items() if k not in ("epoch", "step")}
    if "loss" not in row and "train/loss" in values:
        values["train/epoch_loss"] = values.pop("train/loss")
    return values


def log(loggers: Sequence[Logger], rows: Sequence[Row], first: int = 0) -> None:
    """Write `rows`, of which the first is line `first` of the history, to each of `loggers`."""
    for number, row in enumerate(tqdm(rows, "dashboard", disable=len(rows) < LONG or None, leave=False), first):
        values = shown(row)
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                # By its own count of steps a row that comes again would stand there twice. Where a server has rows from
                # before a kill, it says how many; each of them would be refused with a warning.
                if number >= logger.experiment.starting_step:
                    if "loss" not in row:
                        _define(logger, values)
                    named = _add_prefix({"epoch": row["epoch"], **values}, logger._prefix, logger.LOGGER_JOIN_CHAR)
                    logger.experiment.log({**named, "trainer/global_step": row["step"]}, step=number)
            elif isinstance(logger, TensorBoardLogger):
                # The row of an epoch's last step has said which epoch it is.
                _write_event(logger, {"epoch": row["epoch"], **values} if "loss" in row else values, row["step"])
            else:
                logger.log_metrics({"epoch": row["epoch"], **values}, row["step"])


def _write_event(logger: TensorBoardLogger, values: dict[str, float], step: int) -> None:
    """One event for all values, a quarter of the time of one each."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    named = _add_prefix(values, logger._prefix, logger.LOGGER_JOIN_CHAR)
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in named.items()])
    logger.experiment._get_file_writer().add_summary(summary, step)


def _define(logger: WandbLogger, values: dict[str, float]) -> None:
    """Have W&B draw the values of an epoch over epochs, and keep the least of each error and loss."""
    defined: set[str] = vars(logger).setdefault("defined", set())
    new = sorted(values.keys() - defined)
    axis, *names = _add_prefix(dict.fromkeys(("epoch", *new), 0.0), logger._prefix, logger.LOGGER_JOIN_CHAR)
    for name in names:  # each by itself: of two patterns W&B takes the first, which is Lightning's for everything
        least = "min" if "error" in name or "loss" in name else None
        logger.experiment.define_metric(name, step_metric=axis, summary=least)
    defined.update(new)


def describe(loggers: Sequence[Logger], config: dict[str, Any], folder: Path, net: nn.Module | None = None) -> None:
    """Tell `loggers` the config of the run of `folder`, and W&B which `net` to watch, before anything is logged.

    TensorBoard gets its hyperparameters in the end, beside what came of them.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.hparams.update(config)
        elif isinstance(logger, WandbLogger):
            if logger.version and logger.version != wandb_id(folder):
                write_whole(folder / "wandb_id", f"{logger.version}\n")
            logger.log_hyperparams(config)
            if net is not None and options(logger).watch:
                logger.watch(net, log=options(logger).watch, log_graph=False)
        elif isinstance(logger, CSVLogger):
            logger.log_hyperparams(config)


def begin(loggers: Sequence[Logger], rows: Sequence[Row], known: Sequence[str] = ()) -> list[str]:
    """Make `loggers` show `rows`, the history up to now, and nothing else, before a run begins or goes on.

    `known` are the event files of TensorBoard that held all of `rows` when the checkpoint was saved, by name; if none
    of them is there, all rows are written anew. Gives those that do so now. Loggers of other kinds keep what they have.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _begin_tensorboard(logger, rows, known)
        elif isinstance(logger, WandbLogger):
            if _is_off(logger):
                continue
            if logger.experiment.offline:
                _remove_offline(logger)
            start = logger.experiment.step  # 0, but where a server has rows, or where this process has logged before
            log([logger], rows[start:], start)
        elif isinstance(logger, CSVLogger):
            Path(logger.experiment.metrics_file_path).unlink(missing_ok=True)
            log([logger], rows)
    save(loggers)
    return [file.name for each in loggers if isinstance(each, TensorBoardLogger) for file in _event_files(each)]


def _begin_tensorboard(logger: TensorBoardLogger, rows: Sequence[Row], known: Sequence[str]) -> None:
    """Tell its reader to forget all from a step on, as SummaryWriter's purge_step does, and write that part anew."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    for old in _end_files(logger):
        old.unlink()
    writer: Any = logger.experiment._get_file_writer()
    own = Path(writer.event_writer._file_name).name
    before = [file for file in _event_files(logger) if file.name != own]
    # Not from the next step on: the row of an epoch has the number of its last step, and may be past the checkpoint.
    start = rows[-1]["step"] if rows and any(file.name in known for file in before) else 0
    if any(file.name > own for file in before):  # read by name, which has the second by another machine's clock
        for file in before:
            file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0.", 1)))
    writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step=start)
    log([logger], [row for row in rows if row["step"] >= start])


def _is_off(logger: WandbLogger) -> bool:
    return bool(getattr(logger.experiment, "disabled", False))  # by WANDB_MODE=disabled


def _event_files(logger: TensorBoardLogger) -> list[Path]:
    files = Path(logger.log_dir).glob("events.out.tfevents.*")
    return sorted(file for file in files if file.suffix != ".end")


def _end_files(logger: TensorBoardLogger) -> list[Path]:
    return list(Path(logger.log_dir).glob("events.out.tfevents.*.end"))


def _remove_offline(logger: WandbLogger) -> None:
    """Remove older offline runs of the same id, which would be sent besides: none can be gone on with."""
    here = Path(logger.experiment.dir).parent
    for old in here.parent.glob(f"offline-run-*/run-{glob.escape(str(logger.experiment.id))}.wandb"):
        if old.parent != here:
            shutil.rmtree(old.parent, ignore_errors=True)


def save(loggers: Sequence[Logger]) -> None:
    """Bring what was logged to the disk, so that a kill loses none of it; W&B offline is written anew instead."""
    for logger in loggers:
        logger.save()


# The end of a run: what it was tested by


def errors_of(results: Row) -> dict[str, float]:
    """The errors of all tests, by the names that dashboards show; `results` is what results.json has or will have."""
    found = {name: value for name, value in results.items() if name.startswith("test/")}
    for test in results.get("tests", [])[1:]:  # the first is among them
        found |= {f"test/{test['test']}/{name}": test[name] for name in ("top1_error", "top5_error")}
    return found


def end(
    loggers: Sequence[Logger],
    folder: Path,
    rows: Sequence[Row],
    errors: dict[str, float],
    config: dict[str, Any],
    typed: dict[str, Any],
    ended: bool = True,
) -> None:
    """Show what the run of `folder`, whose history `rows` are, came to: errors, tables, pictures, hyperparameters.

    `typed` are the settings that were typed, which are compared between runs whatever they are.
    """
    if not rows or not shows_tests(loggers):
        return
    tested = read_test(folder, rows[-1]["step"]) if errors else None
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _end_tensorboard(logger, folder, rows, errors, tested, hyperparameters(config, typed), ended)
        elif isinstance(logger, WandbLogger) and not _is_off(logger):
            if errors or first_batch(folder):
                _end_wandb(logger, folder, rows, errors, tested)
            if ended:
                _log_artifacts(logger, folder, config, errors)


def hyperparameters(config: dict[str, Any], typed: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """What of `config` is compared between runs, flat; and the groups' choices and settings that were `typed`."""
    found: dict[str, bool | int | float | str] = {}
    below = [key for key in typed if "." in key]  # not all that belongs to a choice
    for key, value in flat(config):
        wanted = any(key == known or key.startswith(f"{known}.") for known in (*HYPERPARAMETERS, *below))
        if wanted and value is not None and not key.endswith("_partial_"):
            found[key] = value if isinstance(value, bool | int | float | str) else str(value)
    chosen = {key: str(value) for key, value in typed.items() if key not in found and isinstance(value, str)}
    return dict(sorted({**found, **chosen}.items()))


def _end_tensorboard(
    logger: TensorBoardLogger,
    folder: Path,
    rows: Sequence[Row],
    errors: dict[str, float],
    tested: LastTest | None,
    settings: dict[str, bool | int | float | str],
    ended: bool,
) -> None:
    """In a file of its own, which is there whole or not, and makes way when the run goes on."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import hparams

    first, last, number = rows[0]["step"], rows[-1]["step"], options(logger).media
    named = _add_prefix(errors, logger._prefix, logger.LOGGER_JOIN_CHAR)
    summaries = [(last, Summary(value=[Summary.Value(tag=k, simple_value=v)])) for k, v in named.items()]

    def show(tag: str, step: int, data: bytes, height: int, width: int) -> None:
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        summaries.append((step, Summary(value=[Summary.Value(tag=tag, image=image)])))

    arrived = first_batch(folder) if number else None
    if arrived is not None:
        with Image.open(arrived) as picture:
            show("train/first_batch", first, arrived.read_bytes(), picture.height, picture.width)
    if tested is not None:
        pixels = draw_confusion(tested.matrix, tested.classes)
        show("test/confusion_matrix", last, encoded(pixels), *pixels.shape[:2])
        mistakes = draw_mistakes(tested, number)
        if mistakes is not None:
            show("test/mistakes", last, encoded(mistakes, "JPEG"), *mistakes.shape[:2])
    # Without what says which settings there are: TensorBoard would take one run's for all, instead of looking at each.
    _, began, done = hparams(settings, {})  # type: ignore[no-untyped-call]
    summaries += [(last, began), *([(last, done)] if ended else [])]
    for old in _end_files(logger):
        old.unlink()
    before = _event_files(logger)[-1]  # is read before the new one, and what a run that goes on writes after it
    beside = before.with_name("end.tmp")
    at = before.stat().st_mtime
    with beside.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(file_version="brain.Event:2", wall_time=at).SerializeToString())
        for step, summary in summaries:
            records.write(Event(summary=summary, step=step, wall_time=at).SerializeToString())
    os.replace(beside, before.with_name(f"{before.name}.end"))


def _end_wandb(
    logger: WandbLogger, folder: Path, rows: Sequence[Row], errors: dict[str, float], tested: LastTest | None
) -> None:
    """Beside the values of the last row, so that no row stands there which the history has not."""
    import wandb

    number, run = options(logger).media, logger.experiment
    values: dict[str, Any] = dict(errors)
    arrived = first_batch(folder) if number else None
    if arrived is not None:
        values["train/first_batch"] = wandb.Image(str(arrived))
    chart: dict[str, Any] = {}
    if tested is not None:
        values["test/per_class"] = _table(tested.per_class)
        values["test/confusions"] = _table(_confusions(tested))
        if len(tested.classes) <= CHART:
            chart["test/confusion_matrix"] = _confusion_chart(tested)
        else:
            values["test/confusion_matrix"] = wandb.Image(draw_confusion(tested.matrix, tested.classes))
        seen = [{"picture": wandb.Image(str(tested.file(each))), **each} for each in tested.some(number)]
        if seen:
            values["test/predictions"] = _table(seen)
    named = _add_prefix(values, logger._prefix, logger.LOGGER_JOIN_CHAR)
    if run.step == len(rows) - 1 >= run.starting_step:
        run.log({**named, **_add_prefix(chart, logger._prefix, logger.LOGGER_JOIN_CHAR)}, step=len(rows) - 1)
    else:  # the server has that row from before a kill, and takes no more for it
        run.summary.update(named)


def _table(rows: Sequence[Row]) -> Any:
    import wandb

    names: list[Any] = list(rows[0]) if rows else ["label", "answer", "images"]
    return wandb.Table(columns=names, data=[[row[name] for name in names] for row in rows], allow_mixed_types=True)


def _confusions(tested: LastTest) -> list[Row]:
    """What is taken for what, most often first."""
    wrong = tested.matrix.copy()
    wrong[range(len(wrong)), range(len(wrong))] = 0
    most = (-wrong).ravel().argsort(kind="stable")[:CONFUSIONS]
    pairs = [(int(i) // len(wrong), int(i) % len(wrong)) for i in most]
    names = tested.classes
    return [{"label": names[i], "answer": names[j], "images": int(wrong[i, j])} for i, j in pairs if wrong[i, j]]


def _confusion_chart(tested: LastTest) -> Any:
    import wandb

    names = tested.classes
    rows = [
        {"Actual": names[i], "Predicted": names[j], "nPredictions": int(count)}
        for i, row in enumerate(tested.matrix.tolist())
        for j, count in enumerate(row)
    ]
    fields = {name: name for name in rows[0]}
    return wandb.plot_table("wandb/confusion_matrix/v1", _table(rows), fields, {"title": "confusion matrix"})


def _log_artifacts(logger: WandbLogger, folder: Path, config: dict[str, Any], errors: dict[str, float]) -> None:
    """The checkpoints that are wanted, as coming of the index, and the evaluation as coming of the last of them."""
    import wandb

    wanted, run = options(logger).artifacts, logger.experiment
    files = {name: folder / CHECKPOINTS / f"{name}.ckpt" for name in ARTIFACTS[wanted]}
    files = {name: file for name, file in files.items() if file.is_file() and not file.is_symlink()}
    if not files:
        return
    about = json.loads((folder / "environment.json").read_text())
    digest = str(about["index_hash"])
    index = wandb.Artifact(f"index-{digest[:12]}", type="dataset", metadata={"digest": digest})
    with index.new_file("index.json") as file:
        json.dump({"digest": digest, "data": config.get("data")}, file, indent=2)
    # As run.use_artifact does with what is not there yet, but that refuses to offline, and waits for the server.
    run._log_artifact(index, is_user_created=True, use_after_commit=True)
    for name, checkpoint in files.items():
        model = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"file": checkpoint.name, **errors})
        model.add_file(str(checkpoint), policy="immutable")  # not copied
        alias = "latest" if name == "last" else name
        # The test was of the last weights: these are used by what follows.
        run._log_artifact(model, aliases=[alias], use_after_commit=name == "last")
    if errors:
        evaluation = wandb.Artifact(f"evaluation-{run.id}", type="evaluation", metadata=dict(errors))
        with evaluation.new_file("errors.json") as file:
            json.dump({"checkpoint": f"checkpoint-{run.id}:latest", **errors}, file, indent=2)
        for name in ("test.json", "confusion.npz"):
            if (folder / "media" / name).is_file():
                evaluation.add_file(str(folder / "media" / name))
        run.log_artifact(evaluation, aliases=["latest"])


def rebuild(
    logger: Logger,
    rows: Sequence[Row],
    config: dict[str, Any],
    folder: Path,
    errors: dict[str, float],
    typed: dict[str, Any],
    ended: bool = True,
) -> str:
    """Write a dashboard of the run of `folder` anew, from its history and what it came to; says how to look at it."""
    if isinstance(logger, TensorBoardLogger):
        for old in (*_event_files(logger), *_end_files(logger), Path(logger.log_dir, logger.NAME_HPARAMS_FILE)):
            old.unlink(missing_ok=True)
    elif not isinstance(logger, CSVLogger | WandbLogger):
        logger.log_hyperparams(config)
    describe([logger], config, folder)
    begin([logger], rows)
    end([logger], folder, rows, errors, config, typed, ended)
    logger.finalize("success")
    if isinstance(logger, TensorBoardLogger):
        return f"tensorboard --logdir {logger.log_dir}"
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
    return str(Path(logger.log_dir, "metrics.csv")) if isinstance(logger, CSVLogger) else type(logger).__name__


def close(loggers: Sequence[Logger]) -> None:
    """End the run of Weights & Biases, which the next training in this process would write into else."""
    of_wandb = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not of_wandb:
        return
    import wandb

    if wandb.run is not None:
        error = sys.exc_info()[1]
        if any(options(logger).alert for logger in of_wandb):
            _alert(wandb.run, error)
        wandb.run.finish(exit_code=int(error is not None))


def _alert(run: Any, error: BaseException | None) -> None:
    """Tell whoever waits for `run` that it has ended, or by what; a signal is no news to whoever sent it."""
    if error is None:
        run.alert(f"{run.name} has ended", str(dict(run.summary).get("test/top1_error", "")) or "not tested")
    elif isinstance(error, Exception):
        run.alert(f"{run.name} ended by an error", str(error)[:1000], level="ERROR")


def wandb_id(folder: Path, chosen: str | None = None) -> str:
    """The id of the W&B run of the run folder `folder`: `chosen`, or the one it has, or a new one."""
    path = folder / "wandb_id"
    return str(chosen or (path.read_text().strip() if path.is_file() else "") or secrets.token_hex(4))
