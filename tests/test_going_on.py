from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from spp_cls import door
from spp_cls.going_on import OVERRIDES, began_with, go_on, settings, settings_in, settings_of, unfinished

WORDS = ["model=zf5", "seed=3", "data.root=/pictures"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was started with WORDS, in the working folder, saved once and did not end."""
    door.register_resolvers()
    HydraConfig.instance().cfg = None  # of a command that was run in this process before
    monkeypatch.chdir(tmp_path)
    folder = Path("runs", "shapes-zf5", "2026-01-01_00-00-00_0000")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(WORDS), folder / OVERRIDES)
    config = door.compose("train", WORDS)
    config.callbacks.best.dirpath = config.logger.tensorboard.save_dir = "/where/it/was"
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    return folder


def test_its_own_settings_then_those_that_are_typed(run: Path) -> None:
    here = [f"ckpt_path='{run}/checkpoints/last.ckpt'", f"hydra.run.dir='{run}'", "hydra.output_subdir=null"]
    assert go_on([f"ckpt_path={run}"]) == [*WORDS, *here]
    assert settings() == WORDS
    assert go_on([f"ckpt_path={run}", "seed=4", "trust=true"]) == [
        *("model=zf5", "data.root=/pictures", "seed=4", "trust=true"),
        *here,
    ]
    assert settings() == ["model=zf5", "data.root=/pictures", "seed=4"]
    assert go_on(["ckpt_path=last"]) == [*WORDS, *here]
    assert go_on(["resume=auto", *WORDS]) == ["resume=auto", *WORDS, "trust=true", *here]


def test_a_command_that_goes_on_with_nothing_is_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on(WORDS) == WORDS
    assert capsys.readouterr().err == ""
    assert go_on(["resume=auto", "seed=5"]) == ["resume=auto", "seed=5"]
    assert "resume=auto: no unfinished run of these settings; a new one begins" in capsys.readouterr().err
    assert settings() == []
    (run / "results.json").touch()
    assert unfinished(WORDS) is None


def test_torchrun_goes_on_with_its_own_job_though_machines_come_and_go(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert go_on(WORDS) == WORDS
    (run / "environment.json").write_text(json.dumps({"job": "mine"}))
    assert f"hydra.run.dir='{run}'" in go_on(WORDS)
    assert go_on([*WORDS, "resume=null"]) == [*WORDS, "resume=null"]


def test_what_hydra_would_run_is_no_setting() -> None:
    foreign = [
        *("hydra.launcher._target_=os.system", "+hydra.callbacks.x._target_=os.system", "++hydra.sweeper.x=1"),
        *("hydra/launcher=nope", "~hydra.job", "--config-dir=x", "-m", "trust=true", "ckpt_path=x", "resume=auto"),
        *(" hydra.run.dir=x", "'hydra.run.dir'=x"),
    ]
    assert settings_in([*foreign, "seed=1", "+callbacks.x.y=2", "~data.flip", "hydraulic=1"]) == [
        *("seed=1", "+callbacks.x.y=2", "~data.flip", "hydraulic=1")
    ]


def test_defaults_that_have_changed_since_are_those_of_the_run(run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    del config.optimizer.fused  # an argument that came later
    config.optimizer.betas = [0.8, 0.9]
    config.data.flip = 0.25
    config.schedule["it's new"] = 1  # no key that Hydra could be told
    config.schedule.gone = "a b"
    OmegaConf.save(config, run / "config.yaml")
    words = began_with(run, WORDS, set())
    assert set(words) == {"~optimizer.fused", "optimizer.betas=[0.8,0.9]", "data.flip=0.25", "+schedule.gone='a b'"}
    assert began_with(run, WORDS, {"data.flip", "optimizer"}) == ["+schedule.gone='a b'"]
    now = door.compose("train", [*WORDS, *words])
    assert "fused" not in now.optimizer and now.schedule.gone == "a b" and now.optimizer.betas == [0.8, 0.9]


def test_settings_that_were_lost_are_in_the_config(run: Path) -> None:
    for text in ("", "a: [", "{}"):
        (run / OVERRIDES).write_text(text)
        assert settings_of(run) is None
    again = door.compose("train", began_with(run, [], set()))
    was = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=True)
    assert (again.model.name, again.seed, again.data.root, again.name) == ("zf5", 3, "/pictures", "shapes-zf5")
    assert isinstance(was, dict)
    assert OmegaConf.to_container(again.model, resolve=True) == was["model"]


def test_pictures_that_lie_beside_where_the_run_began(run: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.data.root = "mine"
    OmegaConf.save(config, run / "config.yaml")
    (tmp_path / "there" / "mine").mkdir(parents=True)
    (run / "environment.json").write_text(json.dumps({"folder": str(tmp_path / "there")}))
    assert f"data.root='{tmp_path / 'there' / 'mine'}'" in began_with(run, [], set())


def test_two_ways_to_go_on_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="resume=auto with ckpt_path=x: give one of them"):
        go_on(["resume=auto", "ckpt_path=x"])
