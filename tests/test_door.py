"""The door: one line for each mistake, and the habits that people bring."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Spp, results_of
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from spp_cls import door
from spp_cls.door import HINTS

# Mistakes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["modle=zf5"], "modle: there is no such key; did you mean model?"),
        (["data.batchsize=3"], "data.batchsize: there is no such key; did you mean data.batch_size?"),
        (["optimzer.lr=1"], "optimzer.lr: there is no such key; did you mean optimizer.lr?"),
        (["trainer.max_epoch=3"], "trainer.max_epoch: there is no such key; did you mean trainer.max_epochs?"),
        (["model.lerning_rate=1"], "model.lerning_rate: there is no such key; here it is called optimizer.lr"),
        (["~modle"], "modle: there is no such key; did you mean model?"),
        (["data.layout.val_shar=0.1"], "data.layout.val_shar: there is no such key; see spp train --cfg job"),
        (["data=table", "data.layout.val_shar=0.1"], "did you mean data.layout.val_share?"),
        (["model=zf6"], "model=zf6: there is no model of that name; did you mean zf5? (convnet5, "),
        (["experiment=tabel2a_no_spp"], "there is no experiment of that name; did you mean table2a_no_spp?"),
        (["trainer=tpu"], "trainer=tpu: there is no trainer of that name; did you mean gpu? (cpu, ddp, default, gpu"),
        (["data=foldr"], "data=foldr: there is no data of that name; did you mean folder? (caltech101, cifar10, fol"),
        (["logger=foo"], "logger=foo: there is no logger of that name; choose one (csv, none, tensorboard, wandb)"),
        (["logger=[csv,tensorbord]"], "logger=tensorbord: there is no logger of that name; did you mean tensorboard?"),
        (["model=null"], "model=null: something must be chosen"),
        (["+experiment=table2a_no_spp"], "experiment: has a choice already; write experiment=…, without the plus"),
        (["foo"], "foo: settings are given as key=value"),
        (["--foo"], "--foo: no such option"),
        (["-x", "seed=1"], "-x: no such option"),
        (["model.levels=[6"], "model.levels=[6: cannot be read as key=value"),
        (["seed=1,2"], "seed=1,2: several values; for a run each add -m, for a list write [ ] round them"),
        (["model.levels=6,3,2,1"], "for a list write [ ] round them"),
        (["model.width=abc"], "model.width=abc: takes a number, like 1.0"),
        (["seed=abc"], "seed=abc: takes a number, like 0"),
        (["model.levels=6"], "model.levels=6: takes a list, like [6, 3, 2, 1]"),
        (["compile=3"], "compile=3: takes true or false"),
        (["trainer.max_epochs=abc"], "trainer.max_epochs=abc: takes a number, like 16"),
        (["data=folder"], "data.root has no value: give one, like data.root=…"),
        (["+foo=1"], "+foo: nothing here reads that key"),
        (["+modle=1"], "+modle: nothing here reads that key; did you mean model?"),
        (["-m", "seed=1,2", "model=tiny,zf6"], "model=zf6: there is no model of that name; did you mean zf5?"),
        (["ckpt_path=/nope"], "ckpt_path=/nope does not exist; name a folder that spp train made"),
        (["ckpt_path=last"], "runs: no run there yet; name a run folder or a checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_it_and_leaves_nothing_behind(
    spp: Spp, tmp_path: Path, words: list[str], line: str
) -> None:
    answer = spp("train", *words)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("spp train: ") and answer.err.count("\n") == 1
    assert line in answer.err
    assert list(tmp_path.iterdir()) == []


# These can only be seen when torch is there; but before any picture is looked for, and after that nothing is left.
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["+model.lerning_rate=1"], "model.lerning_rate: spp_cls.models.sppnet has no such argument"),
        (["+trainer.max_epoch=1"], "trainer.max_epoch: lightning.pytorch.Trainer has no such argument; did you mean m"),
        (
            ["+data.layout.val_shar=1"],
            "data.layout.val_shar: spp_cls.data.layouts.folder has no such argument; did you",
        ),
        (["callbacks=early_stopping", "+callbacks.early_stopping.patince=1"], "did you mean patience?"),
        (["model._target_=mynet.Nte"], "model._target_=mynet.Nte: cannot be imported"),
        (["views.crops=eleven"], "views.crops='eleven': use one of center_crop, ten_crop, full_image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_what_is_built_is_one_line_before_any_picture_is_looked_for(
    spp: Spp, tmp_path: Path, words: list[str], line: str
) -> None:
    answer = spp("train", "data=folder", "data.root=pictures", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "Error" not in answer.out
    assert line in answer.err
    assert "pictures" not in answer.err
    assert not list(tmp_path.rglob(".hydra"))


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_what_has_no_value_is_named(spp: Spp, verb: str) -> None:
    assert spp(verb) == (2, "", f"spp {verb}: run has no value: give one, like run=…\n")
    assert spp(verb, "runs=x").err == f"spp {verb}: runs: there is no such key; did you mean run?\n"


def test_the_traceback_is_there_for_who_asks_for_it(spp: Spp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="eleven"):
        spp("train", "views.crops=eleven")


def test_a_folder_of_somebody_elses_is_not_taken_for_a_run_that_failed(spp: Spp, tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    assert spp("predict", "run=/nope", tmp_path / "thesis.tex").code == 2
    assert spp("train", "hydra.run.dir=.", "views.crops=eleven").code == 2
    assert spp("plan", "views.crops=eleven").code == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# Names of others


@pytest.mark.parametrize("wrong", HINTS)
def test_a_name_of_the_templates_has_a_hint(wrong: str) -> None:
    message = f"Could not override '{wrong}'.\n    full_key: {wrong}"
    assert door._explain("train", [f"{wrong}=1"], message).endswith(f"here it is called {HINTS[wrong]}")


@pytest.mark.parametrize(
    "wrong", ["task_name", "data.data_dir", "model.optimizer.lr", "paths.data_dir", "extras.print_config"]
)
def test_hydra_says_so_as_we_read_it(spp: Spp, wrong: str) -> None:
    answer = spp("train", f"{wrong}=1")
    assert answer == (2, "", f"spp train: {wrong}: there is no such key; here it is called {HINTS[wrong]}\n")


def test_what_the_hints_name_exists_and_what_they_are_for_does_not() -> None:
    door.register_resolvers()
    GlobalHydra.instance().clear()
    config = door.compose("train", ["data=folder"])
    names = {name for hint in HINTS.values() for name in hint.split(" and ")} - {"--cfg job --resolve", "hydra.run.dir"}
    known = set(door.dotted(config))
    assert names <= known
    assert not set(HINTS) & known


# Habits


def test_logger_and_callbacks_take_null_one_or_several(spp: Spp) -> None:
    def chosen(*words: str) -> tuple[set[str], set[str]]:
        answer = spp("train", *words, "--cfg", "job")
        assert answer.code == 0, answer.err
        config = OmegaConf.create(answer.out)
        return set(config.get("logger") or {}), set(config.get("callbacks") or {})

    assert chosen() == ({"tensorboard"}, {"best"})
    assert chosen("logger=null", "callbacks=null") == (set(), set())
    words = ["logger=[tensorboard,csv]", "callbacks=[early_stopping,ema]", "experiment=null", "debug=null"]
    assert chosen(*words) == ({"tensorboard", "csv"}, {"best", "early_stopping", "ema"})


def test_every_argument_of_the_trainer_is_set_without_a_plus(spp: Spp) -> None:
    answer = spp(
        "train", "trainer.limit_train_batches=10", "trainer.profiler=simple", "--cfg", "job", "--package=trainer"
    )
    assert OmegaConf.create(answer.out).limit_train_batches == 10


def test_options_may_stand_between_settings(spp: Spp) -> None:
    answer = spp("train", "--cfg", "job", "seed=3", "--resolve", "name=mine", "--package", "model", "init=gaussian")
    assert answer.code == 0, answer.err
    assert (OmegaConf.create(answer.out).seed, OmegaConf.create(answer.out).init) == (3, "gaussian")


def test_help_with_a_mistake_beside_it(spp: Spp) -> None:
    assert spp("evaluate", "--help").out.count("usage: spp evaluate") == 1
    assert spp("train", "--help", "modle=zf5") == (
        2,
        "",
        "spp train: modle: there is no such key; did you mean model?\n",
    )


# Things of one's own

OWN = {
    "conf/model/mine.yaml": "_target_: mynet.Net\nchannels: 4\n",
    "conf/data/mine.yaml": """
defaults: [base, _self_]
root: flat
layout: {_target_: mydata.by_prefix, _partial_: true, test_every: 3}
""",
    "conf/sizes/rising.yaml": "{_target_: mysizes.rising, _partial_: true, low: 20, high: '${data.region}'}",
    "conf/callbacks/mine.yaml": "{defaults: [default, _self_], mine: {_target_: mycallback.Count, path: counted}}",
    "conf/experiment/mine.yaml": """# @package _global_
defaults: [override /model: mine, override /data: mine, override /sizes: rising, override /callbacks: mine]
data: {region: 32, resize: 36, batch_size: 4, num_workers: 0}
trainer: {max_epochs: 3, accelerator: cpu}
""",
    "mynet.py": """
from torch import nn
from spp_cls.models import SpatialPyramidPool2d
class Net(nn.Module):
    def __init__(self, num_classes, channels):
        super().__init__()
        pyramid = SpatialPyramidPool2d([2, 1])
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 7, 4), pyramid, nn.Linear(channels * 5, num_classes))
    def forward(self, images):
        return self.layers(images)
""",
    "mydata.py": """
from spp_cls.data import Listing
def by_prefix(root, test_every):
    paths = sorted(path.name for path in root.glob("*.jpg"))
    splits = [{0: "test", 1: "val"}.get(i % test_every, "train") for i in range(len(paths))]
    return Listing(("a", "b"), paths, ["ab".index(path[0]) for path in paths], splits)
""",
    "mysizes.py": "def rising(seed, epoch, batch, *, low, high):\n    return min(high, low + 6 * epoch)\n",
    "mycallback.py": """
from lightning import Callback
class Count(Callback):
    def __init__(self, path):
        self.path = path
    def on_train_epoch_end(self, trainer, pl_module):
        with open(self.path, "a") as file:
            file.write(f"{trainer.current_epoch}")
""",
}


def lay_own(folder: Path, pictures: Path) -> None:
    for name, text in OWN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "flat").mkdir()
    for path in (*pictures.glob("train/a/*.jpg"), *pictures.glob("train/b/*.jpg")):
        shutil.copy(path, folder / "flat" / f"{path.parent.name}_{path.name}")


@pytest.mark.slow
def test_a_net_a_data_set_sizes_and_a_callback_of_ones_own(spp: Spp, tmp_path: Path, pictures: Path) -> None:
    lay_own(tmp_path, pictures)
    answer = spp("train", "experiment=mine", "logger=null")
    assert answer.code == 0, answer.err
    (run,) = (tmp_path / "runs" / "mine-mine").iterdir()
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row["size"] for row in rows if "size" in row] == [20, 20, 26, 26, 32, 32]
    assert (tmp_path / "counted").read_text() == "012"

    # What it names is not ours, so that others must trust it in so many words.
    answer = spp("evaluate", f"run={run}")
    assert answer.code == 2
    assert "would build mynet.Net, which is not part of spp_cls; add trust=true if you trust it" in answer.err
    assert spp("evaluate", f"run={run}", "trust=true").code == 0
    picture = tmp_path / "flat" / "a_00.jpg"
    assert spp("predict", f"run={run}", picture).code == 2
    assert str(picture) in spp("predict", f"run={run}", "trust=true", picture).out

    answer = spp("train", "experiment=mnie")
    assert "did you mean mine? (mine, study_fine_tune" in answer.err


def test_a_folder_of_configs_can_be_named(spp: Spp, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    (tmp_path / "elsewhere" / "model" / "wide.yaml").write_text("defaults: [tiny, _self_]\nwidth: 2.0\n")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel: {levels: [4]}\n")
    words = ["--config-dir", "elsewhere", "model=wide", "experiment=mine", "--cfg", "job", "--package", "model"]
    model = OmegaConf.create(spp("train", *words).out)
    assert (model.width, model.levels) == (2.0, [4])
    answer = spp("train", "--config-dir", "elsewhere", "model=wied")
    assert "did you mean wide? (convnet5" in answer.err


# Going on


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The finished run, in the working folder of this test."""
    run = tmp_path / "runs" / "folder-tiny" / trained.name
    shutil.copytree(trained, run)
    return run


@pytest.mark.slow
def test_resume_auto_goes_on_with_the_newest_unfinished_run_of_the_same_settings(
    spp: Spp, tmp_path: Path, small: list[str]
) -> None:
    def runs() -> list[Path]:
        return sorted((tmp_path / "runs" / "folder-tiny").iterdir())

    words = [*small, "test=false", "resume=auto"]
    assert spp("train", *words).code == 0  # nothing to go on with
    (first,) = runs()
    whole = (first / "history.jsonl").read_bytes()
    assert spp("train", *words).code == 0  # that one has ended
    assert len(runs()) == 2
    second = runs()[1]
    (second / "results.json").unlink()
    with (second / "history.jsonl").open("a") as history:
        history.write("what was written after the last checkpoint")
    assert spp("train", *words, "seed=1").code == 0  # other settings
    assert len(runs()) == 3
    assert spp("train", *words).code == 0
    assert len(runs()) == 3 and (second / "results.json").is_file()
    assert (second / "history.jsonl").read_bytes() == whole
    (event,) = [json.loads(line) for line in (second / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "resumed" and event["checkpoint"].endswith("last.ckpt")
    assert spp("train", *words, f"ckpt_path={second}").err == (
        f"spp train: resume=auto with ckpt_path={second}: give one of them\n"
    )
    assert "resume=yes: use auto or null" in spp("train", *small, "resume=yes").err


def test_a_run_folder_as_ckpt_path_goes_on_in_it_with_its_own_settings(spp: Spp, copied: Path) -> None:
    before = (copied / "history.jsonl").read_bytes()
    answer = spp("train", f"ckpt_path={copied}", "trainer.max_epochs=4")
    assert answer.code == 0, answer.err
    assert [run.name for run in copied.parent.iterdir()] == [copied.name]
    assert (copied / "history.jsonl").read_bytes().startswith(before)
    steps = [row for row in history(copied) if "size" in row]
    assert [row["step"] for row in steps] == list(range(1, 17))
    assert [row["epoch"] for row in steps] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert [row["size"] for row in steps] == [26] * 4 + [32] * 4 + [26] * 4 + [32] * 4
    assert len(history(copied)) == 16 + 4
    config = OmegaConf.load(copied / "config.yaml")
    assert (config.trainer.max_epochs, config.model.width, config.data.region) == (4, 0.25, 32)
    assert json.loads((copied / "results.json").read_text())["epochs"] == 4
    # It was moved, and still knows which checkpoint is the best.
    state = torch.load(copied / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = (value for key, value in state.items() if key.startswith("ModelCheckpoint"))
    assert best["dirpath"] == str(copied / "checkpoints")
    assert best["best_model_score"] == min(row["val/top1_error"] for row in history(copied) if "val/top1_error" in row)


def test_last_is_the_newest_run_and_one_that_is_done_stays_as_it_is(spp: Spp, copied: Path) -> None:
    older = copied.with_name("2001-01-01_00-00-00_0000")
    shutil.copytree(copied, older)
    (older.with_name("2099-01-01_00-00-00_0000") / ".hydra").mkdir(parents=True)
    (older.with_name("2099-01-01_00-00-00_0000") / ".hydra" / "config.yaml").touch()  # it failed at once
    kept = {name: (copied / name).read_bytes() for name in ("history.jsonl", "config.yaml")}
    results = results_of(copied)
    answer = spp("train", "ckpt_path=last")
    assert answer.code == 0, answer.err
    assert str(copied) in answer.err
    assert results_of(copied) == results
    assert (copied / "history.jsonl").read_bytes() == kept["history.jsonl"]


def test_a_checkpoint_file_by_itself_goes_on_with_the_settings_that_are_given(
    spp: Spp, trained: Path, tmp_path: Path, small: list[str]
) -> None:
    shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "it's mine.ckpt")
    answer = spp("train", *small, "trainer.max_epochs=3", 'ckpt_path="it\'s mine.ckpt"')
    assert answer.code == 0, answer.err
    (run,) = (tmp_path / "runs" / "folder-tiny").iterdir()
    assert [row["step"] for row in history(run) if "size" in row] == [9, 10, 11, 12]


def test_best_by_its_path_is_gone_on_from(spp: Spp, copied: Path) -> None:
    answer = spp("train", f"ckpt_path={copied / 'checkpoints' / 'best.ckpt'}", "trainer.max_epochs=4")
    assert answer.code == 0, answer.err
    assert history(copied)[-1]["epoch"] == 3


def test_a_folder_that_holds_a_run_is_not_written_over(spp: Spp, copied: Path, small: list[str]) -> None:
    before = results_of(copied)
    answer = spp("train", *small, f"hydra.run.dir={copied}", "seed=1")
    assert answer.code == 2 and answer.err.endswith(
        f"a run lies there; go on with it by ckpt_path={copied}, or name another\n"
    )
    assert results_of(copied) == before


def test_what_was_empty_before_stays(spp: Spp, tmp_path: Path) -> None:
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    assert spp("train", "data=folder", "data.root=nope", "hydra.run.dir=mine/empty/run").code == 2
    assert list((tmp_path / "mine").rglob("*")) == [tmp_path / "mine" / "empty"]


@pytest.mark.slow
def test_a_module_of_the_working_folder_hides_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    program = Path(sys.executable).with_name("spp")
    done = subprocess.run([program, "evaluate", "run=nope"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("spp evaluate: run=nope does not exist"), done.stderr


def test_best_is_for_testing(spp: Spp, copied: Path) -> None:
    line = "spp train: ckpt_path=best: best.ckpt is for testing; training goes on from ckpt_path=last\n"
    assert spp("train", "ckpt_path=best") == (2, "", line)


def test_a_run_folder_with_odd_letters_goes_on(spp: Spp, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "it's a run, no=1"
    shutil.copytree(trained, run)
    answer = spp("train", f"ckpt_path={run}", "trainer.max_epochs=3")
    assert answer.code == 0, answer.err
    assert len(history(run)) == 12 + 3


def test_what_changes_the_result_of_a_run_that_goes_on_is_said_and_recorded(spp: Spp, copied: Path) -> None:
    answer = spp("train", f"ckpt_path={copied}", "trainer.max_epochs=3", "data.num_workers=1", "trainer.max_epochs=3")
    assert answer.code == 0, answer.err
    said = "goes on after step 8, with 2 epochs done\notherwise than it began, so that the result will be another:\n"
    assert f"{said}  trainer.max_epochs: 2 → 3\n" in answer.err
    (event,) = [json.loads(line) for line in (copied / "events.jsonl").read_text().splitlines()]
    assert event["changes the result"] == {"trainer.max_epochs": [2, 3]}
    assert event["harmless"]["data.num_workers"] == [0, 1] and "refused" not in event
    kept = list(OmegaConf.load(copied / ".hydra" / "overrides.yaml"))
    assert "trainer.max_epochs=2" not in kept  # a key that is given anew stands there once
    answer = spp("train", f"ckpt_path={copied}", "trainer.accumulate_grad_batches=2")
    assert answer.code == 2
    assert "its run has trainer.accumulate_grad_batches=1, here it is 2; go on with the same" in answer.err


def test_a_run_folder_of_somebody_else_runs_nothing_when_it_goes_on(spp: Spp, copied: Path, tmp_path: Path) -> None:
    overrides = copied / ".hydra" / "overrides.yaml"
    own, ran = overrides.read_text(), tmp_path / "ran"
    foreign = "- model._target_=os.system\n- +model.command='touch ran'\n- trust=true\n"
    overrides.write_text(own + foreign)
    config = (copied / "config.yaml").read_text()
    theirs = OmegaConf.create(config)
    theirs.model._target_ = "os.system"
    OmegaConf.save(theirs, copied / "config.yaml")
    answer = spp("train", f"ckpt_path={copied}")
    assert answer.code == 2
    assert "would build os.system, which is not part of spp_cls; add trust=true if you trust it" in answer.err
    # What Hydra itself would build or look into, before any config is read, is left out.
    hydra = "hydra.launcher._target_=os.system", "+hydra.callbacks.a._target_=os.system", "hydra/launcher=nope"
    overrides.write_text(own + "".join(f"- {word}\n" for word in hydra))
    (copied / "config.yaml").write_text(config)
    answer = spp("train", f"ckpt_path={copied}")
    assert answer.code == 0, answer.err
    assert not ran.exists()


def test_a_job_that_is_started_again_goes_on(
    spp: Spp, copied: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "results.json").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert spp("train", *small).code == 0
    assert [run.name for run in copied.parent.iterdir()] == [copied.name]
    assert (copied / "events.jsonl").is_file()
    (copied / "results.json").unlink()
    assert spp("train", *small, "resume=null").code == 0
    assert len(list(copied.parent.iterdir())) == 2
