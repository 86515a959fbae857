from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image

from spp_cls.__main__ import main

torch.set_num_threads(1)  # two processes run the tests on two cores


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test caches reaches the user's folder, nor the other way round."""
    before = os.environ.get("SPP_CACHE")
    os.environ["SPP_CACHE"] = str(tmp_path_factory.mktemp("spp_cache"))
    yield
    if before is None:
        del os.environ["SPP_CACHE"]
    else:
        os.environ["SPP_CACHE"] = before


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/{train,val,test}/{a,b,c}/ with 36, 9 and 9 JPEGs of 40 to 90 px, each of its own content."""
    root = tmp_path_factory.mktemp("pictures")
    chance = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 3), ("test", 3)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                width, height = (int(side) for side in chance.integers(40, 91, 2))
                coarse = Image.fromarray(chance.integers(0, 256, (4, 5, 3), np.uint8))
                coarse.resize((width, height), Image.Resampling.BICUBIC).save(root / split / name / f"{i:02}.jpg")
    return root


class Answer(NamedTuple):
    """What a command said: its exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Spp = Callable[..., Answer]


def results_of(run: Path) -> dict[str, Any]:
    """What `results.json` holds, but for how long the tests took."""
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return {**found, "tests": [{**test, "seconds": None} for test in found.get("tests", [])]}


def call_spp(*words: str | Path, cwd: Path) -> Answer:
    """`spp words…` in the folder `cwd`, but in this process: to import lightning takes seconds."""
    arguments = [str(word) for word in words]
    out, err = io.StringIO(), io.StringIO()
    before, argv, path, handlers = os.getcwd(), sys.argv, list(sys.path), list(logging.root.handlers)
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    os.chdir(cwd)
    sys.argv = ["spp", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os.chdir(before)
        sys.argv, sys.path[:], logging.root.handlers = argv, path, handlers
        torch.use_deterministic_algorithms(False)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(cwd)):
                del sys.modules[name]
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture
def spp(tmp_path: Path) -> Spp:
    """`spp("train", "key=value", …)` in an empty working folder."""
    return partial(call_spp, cwd=tmp_path)


@pytest.fixture(scope="session")
def small(pictures: Path) -> list[str]:
    """The settings of a training that takes half a second: 4 steps of 8 pictures, at 26 and then at 32 px."""
    return [
        *("data=folder", f"data.root={pictures}", "data.region=32", "data.resize=36", "data.batch_size=8"),
        *("data.num_workers=0", "model.width=0.25", "trainer=cpu", "trainer.max_epochs=2", "logger=null"),
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """The folder of a finished run; to be read, never to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    answer = call_spp("train", *small, cwd=folder)
    assert answer.code == 0, answer.err
    (run,) = (folder / "runs" / "folder-tiny").iterdir()
    return run
