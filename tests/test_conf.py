"""The configs: each composes, each key is an argument of its target, each value of an experiment takes effect."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch
import pytest
import wandb
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from spp_cls.build import refuse_untrusted
from spp_cls.dashboards import OPTIONS
from spp_cls.door import conf_folder, register_resolvers

CONF = conf_folder()
FILES = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}
del FILES["hydra"]  # the launcher of grids, which is no group of ours
VERBS = ["train", "evaluate", "predict", "export", "plan", "check", "log", "cache", "table", "runs", "report", "sweep"]

Node = dict[str, Any]


@pytest.fixture(autouse=True)
def open_conf() -> Iterator[None]:
    register_resolvers()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def compose(*words: str, verb: str = "train", resolve: bool = True) -> Node:
    """The whole config, and under `choices` which file of each group it took."""
    config = hydra.compose(verb, list(words), return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    config.hydra.runtime.output_dir = "RUN"
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {**{str(key): value for key, value in plain.items()}, "choices": choices}


def raw(group: str, name: str) -> Node:
    """A file as it stands, without its defaults."""
    return {k: v for k, v in (yaml.safe_load((CONF / group / f"{name}.yaml").read_text()) or {}).items()}


def leaves(node: Node, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, of all that is no interpolation and no missing value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        elif key != "defaults" and value != "???" and "${" not in str(value):
            found[f"{prefix}{key}"] = value
    return found


def at(node: Node, key: str) -> Any:
    for part in key.split("."):
        node = node[part]
    return node


def overrides(node: Node) -> dict[str, str]:
    """Group → choice, of the defaults that override a group."""
    entries = [entry for entry in node.get("defaults", []) if isinstance(entry, dict)]
    return {k.removeprefix("override /"): v for entry in entries for k, v in entry.items() if "override" in k}


def test_the_groups_are_those_that_the_house_has() -> None:
    assert set(FILES) == {
        "model", "data", "sizes", "views", "recipe", "optimizer", "schedule", "trainer", "logger", "callbacks",
        "debug", "experiment", "hparams_search", "table",
    }  # fmt: skip
    assert sorted(p.stem for p in CONF.glob("*.yaml")) == sorted(VERBS)


def test_every_program_composes() -> None:
    for verb in VERBS:
        assert compose(verb=verb)
    own = ("choices", "measure")
    assert {k: v for k, v in compose(verb="plan").items() if k not in own} == {
        k: v for k, v in compose().items() if k != "choices"
    }


CONSTRUCTORS = sorted(set(FILES) - {"recipe", "experiment", "debug", "table", "hparams_search"})


@pytest.mark.parametrize("turn", range(max(len(FILES[group]) for group in CONSTRUCTORS)))
def test_every_choice_composes_and_each_of_its_keys_is_an_argument_of_its_target(turn: int) -> None:
    chosen = {group: FILES[group][turn % len(FILES[group])] for group in CONSTRUCTORS}
    config = compose(*(f"{group}={name}" for group, name in chosen.items()))
    assert {group: config["choices"][group] for group in chosen} == chosen
    assert list(unknown_keys(config)) == []
    refuse_untrusted(config, CONF)  # whoever is handed the run can test it


def unknown_keys(node: Any, where: str = "") -> Iterator[str]:
    """Keys that stand beside a `_target_` and are no argument of it, and arguments that a function still wants."""
    if isinstance(node, list):
        for i, value in enumerate(node):
            yield from unknown_keys(value, f"{where}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = hydra.utils.get_object(node["_target_"])
        takes = dict(inspect.signature(target).parameters)
        if target is lightning.pytorch.loggers.WandbLogger:  # hands the rest on
            takes |= inspect.signature(wandb.init).parameters
        takes |= dict.fromkeys(OPTIONS.get(target.__name__, ()))  # which build takes out
        given = {key for key in node if not key.startswith("_")}
        yield from (f"{where}.{key}" for key in given - set(takes))
        if node.get("_partial_") and inspect.isfunction(target):
            wanted = {k for k, p in takes.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
            yield from (f"{where}.{key} is not given" for key in wanted - given)
    for key, value in node.items():
        yield from unknown_keys(value, f"{where}.{key}".lstrip("."))


def test_the_reader_of_keys_sees_one_that_is_wrong() -> None:
    layout = {"_target_": "spp_cls.data.layouts.table", "_partial_": True, "val_shar": 0.1}
    config = {"data": {"_target_": "spp_cls.data.MultiSizeDataModule", "batchsize": 1, "layout": layout}}
    assert sorted(unknown_keys(config)) == [
        "data.batchsize",
        "data.layout.table is not given",
        "data.layout.val_shar",
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_of_a_program_is_read(verb: str) -> None:
    sources = "".join(path.read_text() for path in (CONF.parent / "spp_cls").glob("*.py"))
    configs = "".join(path.read_text() for path in CONF.rglob("*.yaml"))
    for key in raw(".", verb):
        if key not in ("defaults", "hydra"):
            assert re.search(rf"config\.{key}\b|\"{key}\"", sources) or f"${{{key}}}" in configs, key


def test_the_trainer_has_every_argument_of_lightnings_with_its_default_but_where_it_says_why() -> None:
    given_by_build = {"logger", "callbacks", "plugins", "default_root_dir", "model_registry"}
    signature = inspect.signature(lightning.pytorch.Trainer).parameters
    config = compose("~recipe")["trainer"]
    assert config.pop("_target_") == "lightning.pytorch.Trainer"
    assert set(config) == set(signature) - given_by_build
    differs = {k: v for k, v in config.items() if v != signature[k].default}
    assert differs == {
        "devices": 1,
        "precision": "32-true",
        "max_epochs": 12,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": True,
        "enable_progress_bar": True,
        "enable_model_summary": False,
        "deterministic": True,
        "benchmark": False,
        "use_distributed_sampler": False,
        "enable_autolog_hparams": False,
    }


def test_the_other_trainers_change_what_they_say_and_no_more() -> None:
    default = compose()["trainer"]
    changes = {
        "default": {},
        "cpu": {"accelerator": "cpu"},
        "gpu": {"accelerator": "gpu", "precision": "bf16-mixed"},
        "mps": {"accelerator": "mps", "deterministic": "warn"},
        "ddp": {"strategy": "ddp", "devices": "auto"},
    }
    assert set(changes) == set(FILES["trainer"])
    for name, expected in changes.items():
        other = compose(f"trainer={name}")["trainer"]
        assert {key: value for key, value in other.items() if value != default[key]} == expected


# What an experiment, a recipe or a debug says takes effect, with whatever else is chosen


# Of the studies of pyramids, which differ in one value, one.
EXPERIMENTS = [name for name in FILES["experiment"] if not name.startswith("study_pyramid_") or name.endswith("_1")]
MODELS, RECIPES, EXPERIMENTS = FILES["model"], FILES["recipe"], [*EXPERIMENTS, ""]
DATA = [name for name in FILES["data"] if name != "base"]


def combinations(model: str) -> list[tuple[str, str, str]]:
    """Data, recipe and experiment for each run with `model`: over all models, each choice meets each other."""
    m = MODELS.index(model)
    recipes = len(RECIPES)
    return [(DATA[(m + e) % len(DATA)], RECIPES[(m // 2 + e) % recipes], name) for e, name in enumerate(EXPERIMENTS)]


def test_each_choice_meets_each_other() -> None:
    met = [(model, *row) for model in MODELS for row in combinations(model)]
    for i, a in enumerate((MODELS, DATA, RECIPES, EXPERIMENTS)):
        for j, b in enumerate((MODELS, DATA, RECIPES, EXPERIMENTS)):
            assert i == j or len({(row[i], row[j]) for row in met}) == len(a) * len(b)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_value_of_model_data_recipe_and_experiment_takes_effect_together(model: str) -> None:
    for data, recipe, experiment in combinations(model):
        words = [f"model={model}", f"data={data}", f"recipe={recipe}"]
        words += [f"experiment={experiment}"] if experiment else []
        config = compose(*words, resolve=False)
        last = raw("experiment", experiment) if experiment else {}
        expected = {f"model.{k}": v for k, v in leaves(raw("model", model)).items()}
        expected |= {f"data.{k}": v for k, v in leaves(raw("data", "base")).items()}
        expected |= {f"data.{k}": v for k, v in leaves(raw("data", data)).items()}
        expected |= leaves(raw("recipe", recipe)) | leaves(last)
        assert {key: at(config, key) for key in expected} == expected, words
        groups = overrides(raw("recipe", recipe)) | overrides(last)
        assert {group: config["choices"][group] for group in groups} == groups, words
        assert list(unknown_keys({key: config[key] for key in ("optimizer", "schedule", "classifier")})) == []


@pytest.mark.parametrize("debug", FILES["debug"])
def test_every_value_of_a_debug_takes_effect(debug: str) -> None:
    expected = leaves(raw("debug", debug))
    config = compose(f"debug={debug}", "recipe=paper", "experiment=table2c_multi_size", "data=imagenet", resolve=False)
    assert {key: at(config, key) for key in expected} == expected


def test_the_command_line_has_the_last_word() -> None:
    words = ["model.levels=[3]", "sizes=uniform", "optimizer.lr=1", "trainer.max_epochs=3", "data.batch_size=7"]
    config = compose("experiment=table2a_no_spp", "recipe=paper", "debug=limit", *words)
    assert config["model"]["levels"] == [3]
    assert config["choices"]["sizes"] == "uniform"
    assert (config["optimizer"]["lr"], config["trainer"]["max_epochs"], config["data"]["batch_size"]) == (1, 3, 7)


# Experiments


STUDIES = [name for name in FILES["experiment"] if name.startswith("study_")]


@pytest.mark.parametrize("name", sorted(set(FILES["experiment"]) - set(STUDIES)))
def test_an_experiment_says_what_of_the_paper_it_is_what_to_expect_and_how_to_run_it(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    body = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert header[0] == "# @package _global_"
    assert re.search(r"Table \d|§\d", header[1])
    assert re.search(r"Expected .*\d\d\.\d\d", " ".join(header))
    assert len(body) <= 8
    command = next(line for line in header if line.startswith("# spp train ")).removeprefix("# spp train ").split()
    assert command[0] == f"experiment={name}"
    levels, sizes = ROWS[name]
    config = compose(*command)
    assert (config["model"]["levels"], config["choices"]["sizes"]) == (levels, sizes)
    assert config["sizes"].get("sizes", [180, 224]) == [180, 224]


ROWS = {
    "table2a_no_spp": ([6], "single"),
    "table2b_single_size": ([6, 3, 2, 1], "single"),
    "table2c_multi_size": ([6, 3, 2, 1], "alternating"),
    "text_30_bins": ([4, 3, 2, 1], "single"),
    "text_uniform_size": ([6, 3, 2, 1], "uniform"),
}


PYRAMIDS = {"1": [1], "21": [2, 1], "321": [3, 2, 1], "4321": [4, 3, 2, 1], "6321": [6, 3, 2, 1], "6": [6]}
# What each study changes of the defaults: choices of groups, and values.
CHANGES: dict[str, dict[str, Any]] = {
    "study_four_sizes": {"sizes.sizes": [128, 160, 192, 224]},
    "study_size_per_batch": {"choices.sizes": "per_batch", "sizes.sizes": [128, 160, 192, 224]},
    "study_growing_sizes": {"choices.sizes": "growing", "sizes.low": 128, "sizes.high": 224, "sizes.epochs": 16},
    "study_full_image": {"choices.sizes": "full_image", "choices.views": "full_image", "sizes.size": 224},
    "study_fine_tune": {
        "choices.sizes": "single",
        "model.init_from": "RUN",
        "trainer.max_epochs": 4,
        "optimizer.lr": 1e-4,
    },
    **{
        f"study_pyramid_{name}": {"choices.sizes": "single", "sizes.size": 224, "model.levels": levels}
        for name, levels in PYRAMIDS.items()
    },
}


def test_the_studies_are_those_whose_changes_are_known() -> None:
    assert set(CHANGES) == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_studies_what_is_expected_or_unknown_and_how_to_run_it(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    body = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert header[0] == "# @package _global_"
    assert header[1].startswith("# Study: ")
    assert re.search(r"Expected|Unknown", " ".join(header))
    assert len(body) <= 8
    command = next(line for line in header if line.startswith("# spp train ")).removeprefix("# spp train ").split()
    assert command[:3] == [f"experiment={name}", "model=torchvision", "model.name=resnet18"]
    config = compose(*command)
    assert {key: at(config, key) for key in CHANGES[name]} == CHANGES[name]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_takes_effect_with_any_net_data_and_recipe(name: str) -> None:
    for model, data, recipe, region in (("zf5", "imagenet", "paper", 224), ("small32", "cifar10", "scratch", 32)):
        words = [f"experiment={name}", f"model={model}", f"data={data}", f"recipe={recipe}"]
        config = compose(*words)
        changes = dict(CHANGES[name])
        for key in ("sizes.sizes", "sizes.size", "sizes.low", "sizes.high"):
            if key in changes:
                given = changes[key]
                scaled = [round(size * region / 224) for size in ([given] if isinstance(given, int) else given)]
                changes[key] = scaled[0] if isinstance(given, int) else scaled
        if "sizes.epochs" in changes:
            changes["sizes.epochs"] = {"paper": 70, "scratch": 16}[recipe]
        assert {key: at(config, key) for key in changes} == changes
        assert list(unknown_keys(config)) == []


@pytest.mark.parametrize(("region", "small"), [(224, 180), (32, 26)])
def test_sizes_are_in_proportion_to_the_region(region: int, small: int) -> None:
    def sizes(name: str) -> Node:
        chosen: Node = compose(f"sizes={name}", f"data.region={region}")["sizes"]
        return chosen

    assert sizes("alternating")["sizes"] == [small, region]
    assert sizes("single")["size"] == region
    assert (sizes("uniform")["low"], sizes("uniform")["high"]) == (small, region)
    four = [round(size * region / 224) for size in (128, 160, 192, 224)]
    assert sizes("per_batch")["sizes"] == four
    assert (sizes("growing")["low"], sizes("growing")["high"]) == (four[0], region)


def test_what_is_computed_follows_what_is_given() -> None:
    config = compose("seed=7", "init=gaussian", "model=zf5", "data=cifar10")
    assert config["model"]["seed"] == config["data"]["seed"] == config["classifier"]["seed"] == 7
    assert config["model"]["init"] == "gaussian"
    assert config["name"] == "cifar10-zf5"
    assert (config["data"]["region"], config["data"]["val_sizes"], config["sizes"]["sizes"]) == (32, [32], [26, 32])


def test_the_papers_recipe() -> None:
    config = compose("recipe=paper", "model=zf5", "data=imagenet")
    assert config["choices"]["optimizer"] == "sgd"
    assert config["optimizer"]["lr"] == 0.01
    assert config["optimizer"]["momentum"] == 0.9
    assert config["optimizer"]["weight_decay"] == 5e-4
    assert config["choices"]["schedule"] == "plateau"
    assert (config["schedule"]["factor"], config["schedule"]["drops"]) == (0.1, 2)
    assert config["data"]["batch_size"] == 128
    assert config["data"]["std"] == [1, 1, 1]
    assert config["trainer"]["max_epochs"] == 70
    others = [compose("recipe=paper", f"model={net}")["trainer"]["max_epochs"] for net in ("overfeat5", "overfeat7")]
    assert others == [90, 90] and compose("recipe=paper", "trainer.max_epochs=9")["trainer"]["max_epochs"] == 9
    assert config["model"]["fc"] == [4096, 4096]
    assert config["model"]["dropout"] == 0.5


def test_files_hold_no_key_twice() -> None:
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> Node:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), (node.start_mark, keys)
        return {k: loader.construct_object(v, deep=True) for k, (_, v) in zip(keys, node.value, strict=True)}

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    for path in Path(CONF).rglob("*.yaml"):
        yaml.load(path.read_text(), Strict)


# The pages that name options


ROOT = Path(__file__).parents[1]


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """(verb, words) of each command, and (train, the word) of each lone key=value, in the page's code."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    fenced = "".join(re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL))
    spans = [*re.findall(r"`([^`\n]+)`", text.replace(fenced, "")), *fenced.splitlines()]
    for span in spans:
        words = [word for word in span.partition("  #")[0].split() if "=" in word and "…" not in word]
        verb = span.split()[1] if span.startswith("spp ") else "train"
        if words:
            yield verb, words


@pytest.mark.slow
@pytest.mark.parametrize(("page", "least"), [("fidelity.md", 15), ("studies.md", 15)])
def test_every_option_that_a_page_names_exists(page: str, least: int) -> None:
    found = list(commands(page))
    assert sum(len(words) for _, words in found) >= least
    composed: dict[tuple[str, ...], Node] = {}
    for verb, words in found:
        runs = [one for word in words if word.startswith("experiment=") for one in word[11:].split(",")]
        assert set(runs) <= set(FILES["experiment"]), runs
        rest = [word for word in words if not word.startswith(("experiment=", "run="))]
        if rest and (verb, *rest) not in composed:
            config = composed[(verb, *rest)] = compose(*(f"experiment={run}" for run in runs[:1]), *rest, verb=verb)
            groups = [word.split("=") for word in rest if word.partition("=")[0] in config["choices"]]
            assert all(config["choices"][group] == choice for group, choice in groups)


def test_fidelity_names_every_place_where_a_comment_says_paper() -> None:
    package = ROOT / "spp_cls"
    with_comments = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8").count("Paper: ")
        for path in package.rglob("*.py")
        if "Paper: " in path.read_text(encoding="utf-8")
    }
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    listed = {name: int(count) for name, count in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", page, re.MULTILINE)}
    assert listed == with_comments
