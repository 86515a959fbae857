"""What dashboards show, read as they themselves read it, to be compared with the history."""

from __future__ import annotations

import csv
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Row = dict[str, Any]


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing goes over the network, and no process of W&B stays behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def shown(row: Row) -> Row:
    """A line of the history under the names that dashboards give its values."""
    names = {name: f"train/{name}" for name in ("size", "height", "width", "lr", "loss")}
    names |= {"train/loss": "train/epoch_loss"}  # not that of the epoch's last step
    return {names.get(name, name): value for name, value in row.items() if name != "step"}


def read_tensorboard(folder: Path) -> list[tuple[str, int, float]]:
    """Every point: its tag, step and value, sorted."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return sorted((tag, each.step, each.value) for tag in events.Tags()["scalars"] for each in events.Scalars(tag))


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


def read_wandb(folder: Path) -> list[tuple[int, Row]]:
    """Number and values of every row in the only .wandb file below `folder`, but not what W&B adds to each.

    The file is a log in LevelDB's format: blocks of 32 KiB, in them pieces of records, each behind a header of 7 bytes
    (CRC 4, length 2, kind 1: whole, first, middle or last piece); the first block begins with 7 bytes of W&B's.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # a run that has been finished may still be on its way to the file
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):
            continue
        history, record = Record.FromString(record).history, b""
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        if values:
            rows.append((history.step.num, {k: v for k, v in values.items() if not k.startswith("_")}))
    return rows


def as_wandb(history: list[Row]) -> list[tuple[int, Row]]:
    return [(number, {"trainer/global_step": row["step"], **shown(row)}) for number, row in enumerate(history)]
