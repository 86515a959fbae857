"""Dashboards that follow the history: each line of it once, however often a run was killed and gone on with."""

from __future__ import annotations

import glob
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tqdm import tqdm

from .run import write_whole

Row = dict[str, Any]  # a line of history.jsonl
LONG = 5000  # rows that take long enough for a progress bar


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


def begin(loggers: Sequence[Logger], rows: Sequence[Row], known: Sequence[str] = ()) -> list[str]:
    """Make `loggers` show `rows`, the history up to now, and nothing else, before a run begins or goes on.

    `known` are the event files of TensorBoard that held all of `rows` when the checkpoint was saved, by name; if none
    of them is there, all rows are written anew. Gives those that do so now. Loggers of other kinds keep what they have.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _begin_tensorboard(logger, rows, known)
        elif isinstance(logger, WandbLogger):
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


def _event_files(logger: TensorBoardLogger) -> list[Path]:
    return sorted(Path(logger.log_dir).glob("events.out.tfevents.*"))


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


def rebuild(logger: Logger, rows: Sequence[Row], config: dict[str, Any]) -> str:
    """Write a dashboard anew: all `rows`, and `config` as its hyperparameters; says how to look at it."""
    if isinstance(logger, TensorBoardLogger):
        for old in _event_files(logger):
            old.unlink()
        # Lightning writes the metrics that stand beside them as scalars, too: those make way for `rows`.
        last = next((row for row in reversed(rows) if "loss" not in row), rows[-1])
        logger.log_hyperparams(config, shown(last), last["step"])
    else:
        logger.log_hyperparams(config)
    begin([logger], rows)
    logger.finalize("success")
    if isinstance(logger, TensorBoardLogger):
        return f"tensorboard --logdir {logger.log_dir}"
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
    return str(Path(logger.log_dir, "metrics.csv")) if isinstance(logger, CSVLogger) else type(logger).__name__


def close(loggers: Sequence[Logger]) -> None:
    """End the run of Weights & Biases, which the next training in this process would write into else."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        if wandb.run is not None:
            wandb.run.finish(exit_code=int(sys.exc_info()[0] is not None))


def wandb_id(folder: Path, chosen: str | None = None) -> str:
    """The id of the W&B run of the run folder `folder`: `chosen`, or the one it has, or a new one; it is kept there."""
    path = folder / "wandb_id"
    kept = path.read_text().strip() if path.is_file() else ""
    own = str(chosen or kept or secrets.token_hex(4))
    if own != kept:
        write_whole(path, own + "\n")
    return own
