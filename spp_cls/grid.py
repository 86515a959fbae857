"""Hydra's launcher of `-m`: the runs of a grid through the ledger, each a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from .door import one_line, searched

if TYPE_CHECKING:
    from .jobs import Job


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

        assert self.config is not None
        setup_globals()
        sweep = Path(str(self.config.hydra.sweep.dir))
        with one_line("train", sweep):
            jobs, places = self._jobs(job_overrides, initial_job_idx, sweep)
            try:
                outcomes = ledger.run_jobs(jobs, places, {}, ledger.Progress(len(jobs)))
            except ledger.Interrupted as stopped:
                print(ledger.STOPPED, file=sys.stderr)
                raise SystemExit(128 + stopped.number) from None
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

    def _jobs(
        self, job_overrides: Sequence[Sequence[str]], first: int, sweep: Path
    ) -> tuple[list[Job], list[dict[str, str]]]:
        """The jobs, and a place for each of those that run at once."""
        from .build import composed, job_of
        from .jobs import in_group, places

        assert self.config is not None
        search = searched(self.config.hydra.runtime.config_sources)
        common = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
        jobs, trainers = [], []
        for number, overrides in enumerate(job_overrides, start=first):
            words = list(filter_overrides(overrides))
            name = " ".join([f"#{number}", *(word for word in words if word not in common and len(job_overrides) > 1)])
            config = composed([*words, *search])
            for key in ("ckpt_path", "resume"):
                if config[key]:
                    raise ValueError(
                        f"{key}={config[key]} with -m: the runs of a grid go on by themselves; weights alone are taken "
                        "by model.init_from"
                    )
            jobs.append(job_of(config, [*words, *search], sweep / str(number), name))
            trainers.append(config.trainer)
        most = max(trainers, key=lambda trainer: int(trainer.devices) if str(trainer.devices).isdecimal() else 1)
        group = "-".join(sweep.parts[-2:])  # its name and when it began
        return jobs, in_group(places(self.at_once, most.devices, most.accelerator), group)


def register() -> None:
    """Make the launcher known by the name that conf/hydra/launcher/ledger.yaml has."""
    # Hydra takes launchers of the package hydra_plugins alone, and looks for them there.
    with contextlib.suppress(ImportError):
        importlib.import_module("hydra_plugins")
    package: Any = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.spp_cls = sys.modules["hydra_plugins.spp_cls"] = sys.modules[__name__]
    LedgerLauncher.__module__ = "hydra_plugins.spp_cls"
    Plugins.instance().register(LedgerLauncher)
