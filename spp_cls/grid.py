"""Hydra's launcher of `-m`: the runs of a grid through the ledger, each a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LedgerLauncher(Launcher):
    """Gives each run of a grid to the ledger; one that is done already is passed over, one that was begun goes on."""

    def __init__(self, at_once: int | None = None) -> None:
        self.at_once = at_once
        self.config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Returns `optimized_metric` of each, for sweepers; exit code 1 where one failed, after all have been tried."""
        from . import jobs as ledger
        from .build import composed, job_of

        setup_globals()
        assert self.config is not None
        sweep = Path(str(self.config.hydra.sweep.dir))
        jobs = []
        common = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            words = list(filter_overrides(overrides))
            own = " ".join(word for word in words if word not in common)
            jobs.append(job_of(composed(words), words, sweep / str(number), f"#{number} {own}"))
        trainer = self.config.trainer
        places = ledger.places(self.at_once, trainer.devices, trainer.accelerator)
        outcomes = ledger.run_jobs(jobs, places, {}, ledger.Progress(len(jobs)))
        failed = sum(outcome.row is None for outcome in outcomes)
        if failed:
            print(f"{failed} of {len(jobs)} runs failed; the same command goes on with them", file=sys.stderr)
            raise SystemExit(1)
        metric = self.config.optimized_metric
        returned = []
        for overrides, outcome in zip(job_overrides, outcomes, strict=True):
            done = JobReturn(overrides=overrides, cfg=self.config, working_dir=os.getcwd(), status=JobStatus.COMPLETED)
            done.return_value = ledger.metric_of(outcome, metric) if metric else None
            returned.append(done)
        return returned


def register() -> None:
    """Make the launcher known by the name that conf/hydra/launcher/ledger.yaml has."""
    # Hydra takes launchers of the package hydra_plugins alone, and looks for them there.
    with contextlib.suppress(ImportError):
        importlib.import_module("hydra_plugins")
    package: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.spp_cls = sys.modules["hydra_plugins.spp_cls"] = sys.modules[__name__]
    LedgerLauncher.__module__ = "hydra_plugins.spp_cls"
    Plugins.instance().register(LedgerLauncher)
