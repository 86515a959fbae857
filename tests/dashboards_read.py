"""What dashboards show, read as they themselves read it, to be compared with the history."""

from __future__ import annotations

import csv
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record

Row = dict[str, Any]


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing goes over the network, and no process of W&B stays behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):  # not in the user's home
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "wandb"))
    yield
    wandb.teardown()


def shown(row: Row) -> Row:
    """A line of the history under the names that dashboards give its values."""
    names = {name: f"train/{name}" for name in ("size", "height", "width", "lr", "loss")}
    names |= {"train/loss": "train/epoch_loss"}  # not that of the epoch's last step
    return {names.get(name, name): value for name, value in row.items() if name != "step"}


def read_tensorboard(folder: Path) -> list[tuple[str, int, float]]:
    """Every point: its tag, step and value, sorted; without what stands there of the test."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("test/")]
    return sorted((tag, each.step, each.value) for tag in tags for each in events.Scalars(tag))


class End(NamedTuple):
    """What TensorBoard shows of the end of a run: tag → steps and values; tag → steps and shapes; settings."""

    scalars: dict[str, list[tuple[int, float]]]
    images: dict[str, list[tuple[int, int, int]]]
    settings: dict[str, Any]


def read_tensorboard_end(folder: Path) -> End:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("test/")
    }
    images = {
        tag: [(each.step, each.height, each.width) for each in events.Images(tag)] for tag in events.Tags()["images"]
    }
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    return End(scalars, images, {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()})


def as_tensorboard(history: list[Row]) -> list[tuple[str, int, float]]:
    """What `read_tensorboard` gives where all is well: float32, and the epoch once a step."""
    rows = [(row["step"], name, value) for row in history for name, value in shown(row).items()]
    return sorted({(name, step, float(np.float32(value))) for step, name, value in rows})


def read_csv(folder: Path) -> list[Row]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def as_csv(history: list[Row]) -> list[Row]:
    return [{"step": row["step"], **shown(row)} for row in history]


def records(path: Path) -> Iterator[Record]:
    """What stands in a .wandb file.

    The file is a log in LevelDB's format: blocks of 32 KiB, in them pieces of records, each behind a header of 7 bytes
    (CRC 4, length 2, kind 1: whole, first, middle or last piece); the first block begins with 7 bytes of W&B's.
    """
    wandb.teardown()  # a run that has been finished may still be on its way to the file
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def offline_file(folder: Path) -> Path:
    """The only .wandb file below `folder`."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path


AT_THE_END = ("test/", "train/first_batch")  # what the history has not


def read_wandb(folder: Path) -> list[tuple[int, Row]]:
    """Number and values of every row in the only .wandb file below `folder`, but not what stands there of the test."""
    rows = []
    for record in records(offline_file(folder)):
        values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if values:
            own = {k: json.loads(v) for k, v in values.items() if not k.startswith(("_", *AT_THE_END))}
            rows.append((record.history.step.num, own))
    return rows


@dataclass
class WandbRun:
    """What W&B is told of a run, beside the rows: its place, its config, its summary, axes and minima, artifacts."""

    place: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    metrics: dict[str, tuple[str, bool]] = field(default_factory=dict)  # axis, and whether the least is kept
    end: list[str] = field(default_factory=list)  # names in the rows that the history has not
    artifacts: list[tuple[str, str, list[str], bool, bool]] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)


def read_wandb_run(path: Path) -> WandbRun:
    run = WandbRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            one = record.run
            names = ("run_id", "project", "entity", "run_group", "job_type", "display_name", "notes")
            run.place = {**{name: getattr(one, name) for name in names}, "tags": list(one.tags)}
        config = {"run": record.run.config, "config": record.config}.get(str(kind))
        for item in config.update if config is not None else ():
            _put(run.config, item, "_wandb")
        for item in record.summary.update if kind == "summary" else ():
            _put(run.summary, item, "_")
        if kind == "metric" and record.metric.name:
            run.metrics[record.metric.name] = (record.metric.step_metric, record.metric.summary.min)
        if kind == "history":
            names = {item.key or item.nested_key[0] for item in record.history.item}
            run.end += sorted(name for name in names if name.startswith(AT_THE_END))
        if kind == "artifact" and record.artifact.type in ("dataset", "model", "evaluation"):
            one = record.artifact
            run.artifacts.append((one.type, one.name, sorted(one.aliases), one.user_created, one.use_after_commit))
        if kind == "alert":
            run.alerts.append((record.alert.level, record.alert.title))
    return run


def _put(into: Row, item: Any, less: str) -> None:
    *above, last = list(item.nested_key) or [item.key]
    if (above or [last])[0].startswith(less) or last.endswith("artifact_path"):  # which W&B draws anew each time
        return
    for key in above:
        into = into.setdefault(key, {})
    into[last] = json.loads(item.value_json)


def as_wandb(history: list[Row]) -> list[tuple[int, Row]]:
    return [(number, {"trainer/global_step": row["step"], **shown(row)}) for number, row in enumerate(history)]
