"""`spp table NAME`: run what a table of the paper needs and is not done yet, and write the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .door import key_of, names_apart, open_door

if TYPE_CHECKING:
    from .jobs import Job
    from .results import Row
    from .tables import Spec

OWN = ("table", "rows", "columns", "seeds", "most", "precision", "margin", "same_compute", "at_once", "run", "results")
OWN_TOO = ("output", "hydra", "seed", "views", "tests", "test", "name", "ckpt_path", "resume")
Jobs = dict[tuple[str, str], dict[int, "Job"]]  # (row, column) → seed → job


def run(config: DictConfig) -> None:
    """Everything that `spp table` does with a config."""
    from . import intervals, jobs, tables

    for key, least in (("seeds", 1), ("most", 1)):
        if config[key] is not None and (not isinstance(config[key], int) or config[key] < least):
            raise ValueError(f"{key}={config[key]}: use a whole number of at least {least}")
    if config.precision is not None and not 0 < config.precision < 100:
        raise ValueError(f"precision={config.precision}: use percent points above 0, like 0.5, or null")
    if (config.most is None) != (config.precision is None):
        raise ValueError("precision and most go together: until known to ± precision, but with no more than most seeds")
    if not 0 < config.margin < 100:
        raise ValueError(f"margin={config.margin}: use percent points above 0, like 0.5")
    hydra: Any = HydraConfig.get()
    choice = str(hydra.runtime.choices.table)
    whole: Any = OmegaConf.to_container(config.table, resolve=True)
    spec = tables.chosen(tables.spec_of(choice, whole), config.rows, config.columns)
    words = [word for word in hydra.overrides.task if not _is_own(word)]
    cells, flops = _cells(spec, words, config)
    results = Path(config.results)
    rows = jobs.known_rows([results])
    places = jobs.places(config.at_once, config.trainer.devices, config.trainer.accelerator)
    output = Path(config.output or Path("tables", choice + ("_same_compute" if config.same_compute else "")))

    seeds = config.seeds
    while True:
        wanted = {cell: {seed: by_seed(seed) for seed in range(seeds)} for cell, by_seed in cells.items()}
        in_turn = [by_seed[seed] for seed in range(seeds) for by_seed in wanted.values()]  # each seed a whole table
        _say(spec, in_turn, rows, flops, wanted)
        failed = _do(in_turn, places, rows, results / f"{choice}.jsonl") if config.run else 0
        runs = {
            cell: {seed: rows[job.key] for seed, job in by_seed.items() if job.key in rows}
            for cell, by_seed in wanted.items()
        }
        # Where the number of seeds follows from the widths, an interval has to be a little wider to cover 95 %.
        level = intervals.STOPPED_LEVEL if config.precision is not None else 0.95
        found = _write(spec, runs, flops, config, words, output, level)
        if failed:
            print(f"{failed} runs failed; the same command goes on with them", file=sys.stderr)
            sys.exit(1)
        known = tables.widths(found)
        if not config.run or config.precision is None or not known:
            break
        if not intervals.more_seeds(known, seeds, max(2, config.seeds), config.most, config.precision):
            break
        seeds += 1
    print((output / "table.md").read_text())
    print(f"all of it: {output}/index.html")


def _is_own(word: str) -> bool:
    return key_of(word).partition(".")[0].partition("@")[0] in (*OWN, *OWN_TOO)


def _cells(spec: Spec, words: list[str], config: DictConfig) -> tuple[dict[tuple[str, str], Any], Any]:
    """(row, column) → a function of the seed that gives the job; and the FLOPs of a run of each."""
    from . import build
    from .tables import last_wins, needed

    for word in words:
        for part in (*spec.rows.values(), *spec.columns.values()):
            if key_of(word) in map(key_of, part.settings):
                raise ValueError(
                    f"{word}: the table sets {key_of(word)} itself ({part.name}); choose by rows=[…] and columns=[…], "
                    "or write a table of your own, conf/table/MINE.yaml"
                )
    cells: dict[tuple[str, str], Any] = {}
    flops: dict[tuple[str, str], float] = {}
    for cell, (settings, tests) in needed(spec).items():
        every = list(last_wins([*words, *settings, f"tests=[{','.join(tests)}]", f"name={spec.name}"]))
        composed = build.composed(every)
        flops[cell] = training_flops(composed)
        first = flops[next(iter(flops))]
        if config.same_compute and flops[cell] < first:
            epochs = _as_many(composed, first / flops[cell])
            every = list(last_wins([*every, f"trainer.max_epochs={epochs}"]))
            composed = build.composed(every)
            flops[cell] = training_flops(composed)

        def job(seed: int, cell: Any = cell, every: list[str] = every, composed: DictConfig = composed) -> Job:
            own = composed.copy()
            own.seed = seed
            folder = Path("runs", spec.name, f"{cell[0]}_{cell[1]}_seed{seed}_{{key}}")
            return build.job_of(own, (*every, f"seed={seed}"), folder, f"{cell[0]}, {cell[1]}, seed {seed}")

        cells[cell] = job
    return cells, flops


def _as_many(config: DictConfig, factor: float) -> int:
    """Epochs that cost `factor` as much, ending at the size at which the run of `config` ends."""
    from . import build

    epochs = config.trainer.max_epochs
    datamodule = build.build_datamodule(config)
    last = datamodule.shape_at(epochs - 1, 0)
    wanted = round(epochs * factor)
    near = sorted(range(max(1, wanted - 8), wanted + 9), key=lambda n: (abs(n - epochs * factor), n))
    return next((n for n in near if datamodule.shape_at(n - 1, 0) == last), wanted)


def training_flops(config: DictConfig) -> float:
    """FLOPs of the whole training of `config`; 0 where a net cannot be counted."""
    import torch

    from . import build
    from .cost import cost
    from .plan import images_at
    from .verdict import whole

    datamodule = build.build_datamodule(config)
    epochs = config.trainer.max_epochs
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"trainer.max_epochs={epochs}: a table compares runs of a number of epochs, at least 1")
    images = images_at(datamodule, datamodule.planned_shapes(epochs))
    with torch.device("meta"):
        net = build.build_net(config, len(datamodule.classes))
    try:
        return float(whole(images, {shape: cost(net, shape).training_flops for shape in images}))
    except NotImplementedError:
        return 0.0


def _say(spec: Spec, in_turn: list[Job], rows: Mapping[str, Row], flops: Any, wanted: Jobs) -> None:
    """What is to be done, and what it costs by what has been done."""
    from .verdict import duration

    cell_of = {job.key: cell for cell, by_seed in wanted.items() for job in by_seed.values()}
    left = {job.key for job in in_turn if job.key not in rows}
    work = sum(flops[cell_of[key]] for key in left)
    done = [(flops[cell_of[key]], rows[key]["train_seconds"]) for key in cell_of if key in rows]
    cost, seconds = sum(f for f, _ in done), sum(s for _, s in done)
    said = f"{spec.title}: {len(cell_of)} runs, {len(cell_of) - len(left)} done"
    if left:
        said += f"; {work / 1e15:.3f} PFLOP to train"
        if cost and seconds:
            said += f", about {duration(seconds * work / cost)} at the pace of those that are done"
    print(said, file=sys.stderr)


def _do(in_turn: list[Job], places: Any, rows: dict[str, Row], into: Path) -> int:
    """Run what is not done; each row goes into the file `into` as its run ends. How many failed."""
    from . import jobs
    from .results import add_row, read_rows

    told = jobs.Progress(len(in_turn))
    there = read_rows([into.parent]) if into.parent.exists() else {}

    def tell(outcome: Any, left: int) -> None:
        key = outcome.job.key
        if outcome.row is not None:
            rows[key] = outcome.row
            if key not in there or jobs.lacks(outcome.job, there[key]):
                add_row(into, outcome.row)
                there[key] = outcome.row
        told(outcome, left)

    try:
        outcomes = jobs.run_jobs(in_turn, places, rows, tell)
    except jobs.Interrupted as stopped:
        print("stopped, its runs have saved; the same command goes on", file=sys.stderr)
        sys.exit(128 + stopped.number)
    return sum(outcome.row is None for outcome in outcomes)


def _write(spec: Spec, runs: Any, flops: Any, config: DictConfig, words: list[str], output: Path, level: float) -> Any:
    """The table in all forms; gives the tables."""
    from . import jobs, render, tables
    from .build import tests_of
    from .run import write_whole
    from .tabular import Page

    folders = jobs.folders_by_key()
    every = {spec.test_of(row, column) for row in spec.rows for column in spec.columns}
    names = {test: tests_of([test], config.data.region)[0].name for one in every for test in tables.parts_of(one)}
    runs = dict(runs)
    for row, part in spec.rows.items():
        for column in spec.columns if part.average else ():
            name = names[spec.test_of(row, column)]
            runs[row, column] = tables.average(spec, row, column, runs, name, lambda r, n: _scores(folders, r, n))
    found = tables.fill(spec, runs, names, config.margin, level)
    notes = _notes(spec, runs, config, words)
    found = [_with_notes(table, notes) for table in found]
    drawn = tables.figures(spec, runs, names, level)
    costs = tables.costs(spec, runs, flops, level)
    text = "\n".join(f"{render.markdown(table)}\n" for table in (*found, *costs))
    write_whole(output / "table.md", text)
    for table, metric in zip(found, spec.metrics, strict=True):
        write_whole(output / f"{metric}.csv", render.as_csv(table))
        write_whole(output / f"{metric}.tex", render.latex(table))
    for name, figure in drawn.items():
        for form in ("svg", "pdf"):
            render.draw(figure, output / f"{name}.{form}")
    page = Page(spec.title, spec.about, (*found, *costs), tuple(drawn.values()), notes, OmegaConf.to_yaml(config))
    write_whole(output / "index.html", render.html(page))
    return found


def _with_notes(table: Any, notes: tuple[str, ...]) -> Any:
    from dataclasses import replace

    return replace(table, notes=(*table.notes, *notes))


def _scores(folders: Mapping[str, Path], row: Row, name: str) -> Any:
    import numpy as np

    from .results import scores_path
    from .train import SCORES

    folder = folders.get(row["key"])
    path = scores_path(folder / SCORES, name) if folder else None
    if path is None or not path.is_file():
        return None
    with np.load(path) as kept:
        return kept["labels"], kept["scores"].astype(np.float32)


def _notes(spec: Spec, runs: Any, config: DictConfig, words: list[str]) -> tuple[str, ...]:
    every = [row for by_seed in runs.values() for row in by_seed.values() if "device" in row]
    images = sorted({test["images"] for row in every for test in row["tests"]})
    devices = sorted({str(row["device"]) for row in every})
    torch = sorted({str(row["versions"]["torch"]) for row in every})
    settings = " ".join(word for word in words if not key_of(word).startswith(("data.root", "data.cache", "logger")))
    own = " ".join(f"{key}={json.dumps(OmegaConf.to_container(config)[key])}" for key in ("seeds", "margin"))  # type: ignore[call-overload,index]
    return (
        f"{len(every)} runs; test images: {', '.join(map(str, images)) or 'none yet'}",
        f"machine: {'; '.join(devices) or 'none yet'}; torch {', '.join(torch) or '–'}",
        f"command: spp table {spec.name} {settings} {own}".replace('"', ""),
    )


def main(arguments: list[str] | None = None) -> None:
    """The door; the word that is no key=value names the table."""
    named, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    open_door("table", run, [*others, *(f"table={name}" for name in named)])


if __name__ == "__main__":
    main()
