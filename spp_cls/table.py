"""`spp table NAME`: run what a table of the paper needs and is not done yet, and write the table."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .door import check_folder, check_number, choices_of, conf_folder, fail, key_of, names_apart, open_door, searched

if TYPE_CHECKING:
    from .jobs import Job
    from .results import Row
    from .tables import Spec

# What of a command `spp table` reads itself, and what it sets of each run.
OWN = ("table", "rows", "columns", "seeds", "most", "precision", "margin", "same_compute", "at_once", "run", "results")
SHOWN = ("rows", "columns", "seeds", "most", "precision", "margin", "same_compute")  # of OWN, what decides the table
ASKING = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
SETS = ("seed", "views", "test", "tests", "ckpt_path", "resume")
Jobs = dict[tuple[str, str], dict[int, "Job"]]  # (row, column) → seed → job


@dataclass(frozen=True)
class Plan:
    """A cell's runs: the job of a seed, the FLOPs of its training, and what its tests are called in result rows."""

    job: Callable[[int], Job]
    flops: float
    names: Mapping[str, str]
    classes: int


def run(config: DictConfig) -> None:
    """Everything that `spp table` does with a config."""
    from . import build, intervals, jobs, tables

    _check(config)
    hydra: Any = HydraConfig.get()
    choice = str(hydra.runtime.choices.table)
    whole: Any = OmegaConf.to_container(config.table, resolve=True)
    spec = tables.chosen(tables.spec_of(choice, whole), config.rows, config.columns)
    if config.precision is not None and not spec.compare:
        raise ValueError(
            "precision: there are no two of these rows that the table compares; choose more, or precision=null"
        )
    places = jobs.places(config.at_once, config.trainer.devices, config.trainer.accelerator)
    results = Path(config.results)
    rows = jobs.known_rows([results])
    typed: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${…} is for each run to work out
    words = [word for word in typed if key_of(word).partition("@")[0] not in (*OWN, "output")]
    plans = _plans(spec, words, searched(hydra.runtime.config_sources), config.same_compute)
    if max(plan.classes for plan in plans.values()) <= 5:  # every answer is among five
        spec = replace(spec, metrics=tuple(name for name in spec.metrics if name != "top5_error") or spec.metrics)
    output = Path(config.output or Path("tables", choice + ("_same_compute" if config.same_compute else "")))

    seeds = config.seeds
    while True:
        wanted = {cell: {seed: plan.job(seed) for seed in range(seeds)} for cell, plan in plans.items()}
        every = [by_seed[seed] for seed in range(seeds) for by_seed in wanted.values()]  # each seed a whole table
        first = {(job.key, job.tests): job for job in reversed(every)}  # cells may share runs
        in_turn = [job for job in every if first[job.key, job.tests] is job]
        undone = _say(spec, in_turn, rows, plans, wanted)
        if config.run and undone:
            build.check_devices(config)
        failed = (
            _do(in_turn, jobs.in_group(places, output.name), rows, results / f"{choice}.jsonl") if config.run else 0
        )
        runs = {
            cell: {seed: rows[job.key] for seed, job in by_seed.items() if job.key in rows}
            for cell, by_seed in wanted.items()
        }
        # Where the number of seeds follows from the widths, an interval has to be a little wider to cover 95 %.
        level = intervals.STOPPED_LEVEL if config.precision is not None else 0.95
        found = _write(spec, runs, plans, config, words, output, level)
        if failed:
            print(f"{failed} of {len(in_turn)} runs failed; the same command goes on with them", file=sys.stderr)
            sys.exit(1)
        if not config.run or config.precision is None:
            break
        if not intervals.more_seeds(tables.widths(found), seeds, config.seeds, config.most, config.precision):
            if intervals.more_seeds(tables.widths(found), seeds, config.seeds, config.most + 1, config.precision):
                print(
                    f"most={config.most}: reached before every difference was known to ± {config.precision:g} points",
                    file=sys.stderr,
                )
            break
        seeds += 1
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"all of it: {output}/index.html")


def _check(config: DictConfig) -> None:
    """Raise ValueError where a setting of the table's own is wrong."""
    if config.seeds is None:
        raise ValueError("seeds=None: use a whole number of at least 1")
    check_number("seeds", config.seeds)
    check_number("most", config.most, max(2, config.seeds))
    for key in ("precision", "margin"):
        value = config[key]
        if (value is not None or key == "margin") and not (_is_number(value) and 0 < value < 100):
            raise ValueError(f"{key}={value}: use percent points above 0, like 0.5")
    from .intervals import LEAST

    if config.precision is not None and config.seeds < LEAST:
        raise ValueError(
            f"seeds={config.seeds}: with precision at least {LEAST}; intervals of fewer would cover less than they say"
        )
    if (config.most is None) != (config.precision is None):
        raise ValueError("precision and most go together: until known to ± precision, but with no more than most seeds")
    for key, example in (("rows", "[b,c]"), ("columns", "[zf5]")):
        if config[key] is not None and (not OmegaConf.is_list(config[key]) or not config[key]):
            raise ValueError(f"{key}={config[key]}: takes a list of one or more, like {key}={example}, or null for all")
    if config.results is None:
        raise ValueError("results=None: takes a folder, like results=mine")
    check_folder("results", config.results, config.run)
    check_folder("output", config.output, config.run)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plans(spec: Spec, words: list[str], search: list[str], same_compute: bool) -> dict[tuple[str, str], Plan]:
    """(row, column) → what its runs are; `words` are typed, and `search` says where configs are found."""
    from . import build
    from .tables import last_wins, needed, parts_of

    _refuse_what_the_table_sets(spec, words)
    plans: dict[tuple[str, str], Plan] = {}
    cells: dict[tuple[str, str], tuple[str, str]] = {}  # (key, tests) → the cell that they are of
    for cell, (settings, tests) in needed(spec).items():
        row, column = cell
        every = list(last_wins([*settings, *words, f"tests=[{','.join(tests)}]"]))
        composed = build.composed([*every, *search])
        build.check_run(composed)
        flops = training_flops(composed, tests)
        first = next((plan.flops for (_, of), plan in plans.items() if of == column), flops)
        if same_compute and flops < first:
            epochs = _as_many(composed, first / flops)
            every = list(last_wins([*every, f"trainer.max_epochs={epochs}"]))
            composed = build.composed([*every, *search])
            flops = training_flops(composed, tests)

        def job(seed: int, cell: Any = cell, every: list[str] = every, composed: DictConfig = composed) -> Job:
            own = composed.copy()
            own.seed = seed
            folder = Path("runs", spec.name, f"{cell[0]}_{cell[1]}_seed{seed}_{{key}}")
            name = f"{cell[0]}, {cell[1]}, seed {seed}"
            return build.job_of(own, (*every, f"seed={seed}", *search), folder, name)

        names = {test: build.tests_of([test], composed.data.region)[0].name for test in tests}
        plans[cell] = Plan(job, flops, names, len(build.listed(composed).classes))
        same = job(0).key, " - ".join(names[test] for test in parts_of(spec.test_of(row, column)))
        if same in cells:
            other = ", ".join(cells[same])
            raise ValueError(
                f"{row}, {column} is the same run as {other}, tested the same way: what is typed here takes the "
                "place of what sets them apart"
            )
        cells[same] = cell
    return plans


def _refuse_what_the_table_sets(spec: Spec, words: list[str]) -> None:
    typed = {key_of(word): word for word in words}
    for key in SETS:
        if key in typed:
            instead = {"seed": "; the number of seeds is seeds=5"}.get(key, "")
            raise ValueError(f"{typed[key]}: the table sets {key} of each run itself{instead}")
    from .tables import Part

    for part in (Part(spec.title, spec.settings), *spec.rows.values(), *spec.columns.values()):
        for setting in part.settings:
            if key_of(setting) in ("seed", "test", "tests", "ckpt_path"):  # in vain, or against the table
                raise ValueError(
                    f"table: {setting}, of {part.name}: the table sets {key_of(setting)} of each run itself"
                )
            for key, below in _set_by(setting):
                word = next((typed[one] for one in typed if one == key or (below and one.startswith(f"{key}."))), None)
                if word is not None:
                    raise ValueError(
                        f"{word}: the table sets {key} itself ({part.name}); choose by rows=[…] and columns=[…], "
                        "or write a table of your own, conf/table/MINE.yaml"
                    )


def _set_by(word: str) -> list[tuple[str, bool]]:
    """The keys that a word sets, with those of an experiment that it chooses; and whether what lies below is set."""
    from .door import dotted

    key, _, value = word.partition("=")
    found = [(key_of(word), False)]
    folders = (conf_folder(), Path.cwd() / "conf")
    path = next((path for folder in folders if (path := folder / key / f"{value}.yaml").is_file()), None)
    if key != "experiment" or path is None:
        return found
    content = OmegaConf.load(path)
    assert isinstance(content, DictConfig)
    for entry in content.pop("defaults", []):
        found += [(str(group).split()[-1].lstrip("/"), True) for group in entry] if OmegaConf.is_dict(entry) else []
    keys = dotted(content)
    return [*found, *((key, True) for key in keys if not any(other.startswith(f"{key}.") for other in keys))]


def _as_many(config: DictConfig, factor: float) -> int:
    """Epochs that cost `factor` as much, ending at the size at which the run of `config` ends."""
    from . import build

    epochs = config.trainer.max_epochs
    datamodule = build.listed(config)
    last = datamodule.shape_at(epochs - 1, 0)
    wanted = round(epochs * factor)
    near = sorted(range(max(1, wanted - 8), wanted + 9), key=lambda n: (abs(n - epochs * factor), n))
    return next((n for n in near if datamodule.shape_at(n - 1, 0) == last), wanted)


def training_flops(config: DictConfig, tests: Sequence[str] = ()) -> float:
    """FLOPs of the whole training of `config`; 0 where a net cannot be counted.

    Raises ValueError where the net takes no images of a size that it is trained at, or that `tests` name.
    """
    import torch

    from . import build
    from .cost import check_shapes, cost
    from .plan import images_at
    from .verdict import whole

    epochs = config.trainer.max_epochs
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"trainer.max_epochs={epochs}: a table compares runs of a number of epochs, at least 1")
    if config.trainer.get("fast_dev_run"):
        raise ValueError(f"trainer.fast_dev_run={config.trainer.fast_dev_run}: a table is of whole runs")
    datamodule = build.listed(config)
    images = images_at(datamodule, datamodule.planned_shapes(epochs))
    with torch.device("meta"):
        net = build.build_net(config, len(datamodule.classes))
    every = build.tests_of(tests, datamodule.region)
    for test in every:
        try:
            test.views.check(net)
        except ValueError as error:
            said = str(error).replace("use views=ten_crop", "leave out its row")
            raise ValueError(f"{test.name}: {said}") from None
    check_shapes(net, build.shapes_asked(datamodule, every))
    try:
        return float(whole(images, {shape: cost(net, shape).training_flops for shape in images}))
    except NotImplementedError:
        return 0.0
    except ValueError as error:
        raise ValueError(f"sizes: {error}") from None


def _say(
    spec: Spec, in_turn: list[Job], rows: Mapping[str, Row], plans: Mapping[tuple[str, str], Plan], wanted: Jobs
) -> int:
    """What is to be done, and what it costs by what has been done; how many runs it is."""
    from .words import duration, operations

    cell_of = {job.key: cell for cell, by_seed in wanted.items() for job in by_seed.values()}
    from .jobs import folders_by_key, is_done

    left = {job.key for job in in_turn if job.key not in rows}
    folders = folders_by_key()
    undone = {job.key for job in in_turn if not is_done(job, rows.get(job.key), folders.get(job.key))}
    work = sum(plans[cell_of[key]].flops for key in left)
    trained = [(plans[cell_of[key]].flops, rows[key]["train_seconds"]) for key in cell_of if key in rows]
    cost, seconds = sum(f for f, _ in trained), sum(s for _, s in trained)
    said = f"{spec.title}: {len(cell_of)} runs, {len(cell_of) - len(undone)} done"
    to_test = len(undone) - len(left)
    said += f", {to_test} trained and to be tested further" if to_test else ""
    if left:
        said += f"; {operations(work)} to train"
        if cost and seconds:
            said += f", about {duration(seconds * work / cost)} at the pace of those that are done"
    print(said, file=sys.stderr)
    return len(undone)


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
        print(jobs.STOPPED, file=sys.stderr)
        sys.exit(128 + stopped.number)
    _keep_scores(in_turn, into.parent)
    return sum(outcome.row is None for outcome in outcomes)


def _keep_scores(in_turn: Sequence[Job], results: Path) -> None:
    """Copy the class probabilities that averages are made of to lie beside the result rows, and go where these go."""
    from .jobs import folders_by_key
    from .results import SCORES, scores_path
    from .whole import written_whole

    folders = folders_by_key() if any(job.scores for job in in_turn) else {}
    for job in in_turn:
        for test in job.tests if job.scores and job.key in folders else ():
            own, beside = scores_path(folders[job.key] / SCORES, test), scores_path(results / SCORES / job.key, test)
            if own.is_file() and not beside.is_file():
                with written_whole(beside) as draft:
                    shutil.copyfile(own, draft)


def _write(spec: Spec, runs: Any, plans: Any, config: DictConfig, words: list[str], output: Path, level: float) -> Any:
    """The table in all forms; gives the tables."""
    from . import jobs, render, tables
    from .results import SCORES
    from .tabular import Page
    from .whole import write_whole

    folders = jobs.folders_by_key()
    names = _names(spec, plans)

    def read(row: Row, name: str) -> Any:
        own = [folders[row["key"]] / SCORES] if row["key"] in folders else []
        return _scores([Path(config.results, SCORES, row["key"]), *own], name)

    runs = dict(runs)
    for row, part in spec.rows.items():
        for column in spec.columns if part.average else ():
            (name,) = names[row, column]
            runs[row, column] = tables.average(spec, row, column, runs, name, read)
            possible = set.intersection(*(set(runs[member, column]) for member in part.average))
            missing = sorted(possible - set(runs[row, column]))
            if missing:
                print(
                    f"{part.name}, {spec.columns[column].name}: not averaged for seeds {', '.join(map(str, missing))}: "
                    f"the scores of its nets are neither in {config.results}/{SCORES} nor in run folders; bring either "
                    "here",
                    file=sys.stderr,
                )
    found = tables.fill(spec, runs, names, config.margin, level)
    notes = _notes(spec, runs, config, words)
    found = [_with_notes(table, notes) for table in found]
    sized = tables.by_size(spec, runs, config.margin, level)
    drawn = tables.figures(spec, runs, names, level)
    costs = tables.costs(spec, runs, {cell: plan.flops for cell, plan in plans.items()}, level)
    costs += tables.costs_of_tests(spec, runs, names, level)
    text = "\n".join(f"{render.markdown(table)}\n" for table in (*found, *sized, *costs))
    write_whole(output / "table.md", text)
    for table, metric in zip(found, spec.metrics, strict=True):
        write_whole(output / f"{metric}.csv", render.as_csv(table))
        write_whole(output / f"{metric}.tex", render.latex(table))
    for name, figure in drawn.items():
        for form in ("svg", "pdf"):
            render.draw(figure, output / f"{name}.{form}")
    for number, table in enumerate(sized):
        write_whole(output / f"test_sizes{number or ''}.csv", render.as_csv(table))
    page = Page(
        spec.title, spec.about, (*found, *sized, *costs), tuple(drawn.values()), notes, OmegaConf.to_yaml(config)
    )
    write_whole(output / "index.html", render.html(page))
    written = {*spec.metrics, *drawn, *(f"test_sizes{number or ''}" for number in range(len(sized)))}
    for name in {*tables.METRICS, "errors", "sizes", "learning", "test_sizes"} - written:  # of a table as it was before
        for form in ("csv", "tex", "svg", "pdf"):
            (output / f"{name}.{form}").unlink(missing_ok=True)
    return found


def _names(spec: Spec, plans: Mapping[tuple[str, str], Plan]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(row, column) → what the test of the cell, or the two that it is a difference of, are called in result rows."""
    from .tables import parts_of

    return {
        (row, column): tuple(
            plans[part.average[0] if part.average else row, column].names[test]
            for test in parts_of(spec.test_of(row, column))
        )
        for row, part in spec.rows.items()
        for column in spec.columns
    }


def _with_notes(table: Any, notes: tuple[str, ...]) -> Any:
    from dataclasses import replace

    return replace(table, notes=(*table.notes, *notes))


def _scores(places: Sequence[Path], name: str) -> Any:
    """Labels and class probabilities of the test `name`, of the first of the folders that has them."""
    import numpy as np

    from .results import scores_path

    for place in places:
        with contextlib.suppress(OSError, ValueError, BadZipFile, KeyError), np.load(scores_path(place, name)) as kept:
            return kept["labels"], kept["scores"].astype(np.float32)
    return None


def _notes(spec: Spec, runs: Any, config: DictConfig, words: list[str]) -> tuple[str, ...]:
    every = list({row["key"]: row for by_seed in runs.values() for row in by_seed.values() if "key" in row}.values())
    images = sorted({test["images"] for row in every for test in row["tests"]})
    devices = sorted({str(row["device"]) for row in every})
    torch = sorted({str(row["versions"]["torch"]) for row in every})
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    own = [word for word in typed if key_of(word) in SHOWN]
    own += [] if any(key_of(word) == "seeds" for word in own) else [f"seeds={config.seeds}"]
    settings = " ".join([*words, *own])
    return (
        f"{len(every)} runs; test images: {', '.join(map(str, images)) or 'none yet'}",
        f"machine: {'; '.join(devices) or 'none yet'}; torch {', '.join(torch) or '–'}",
        f"command: spp table {spec.name} {settings}",
    )


def main(arguments: list[str] | None = None) -> None:
    """The door; the word that is no key=value names the table."""
    named, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    if len(named) > 1:
        fail(
            "table",
            f"{' '.join(named)}: one table at a time; rows and columns of it are chosen by rows=[…] columns=[…]",
        )
    keys = {word.partition("=")[0] for word in others}
    if not named and not keys & {"table", *ASKING}:
        known = ", ".join(dict.fromkeys(path.stem for path in choices_of("table")))
        fail("table", f"name a table, like spp table table2; there are {known}")
    if {"-m", "--multirun"} & set(others):
        fail("table", "-m: a table is a grid already; choose of it by rows=[…] columns=[…] seeds=…")
    open_door("table", run, [*others, *(f"table={name}" for name in named)])


if __name__ == "__main__":
    main()
