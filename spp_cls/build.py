"""Config → objects: the only wiring. Everything that a config names is made here."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin
from urllib.parse import urlparse

import hydra.utils
import torch
import torchvision
from hydra._internal.utils import _locate
from hydra.errors import InstantiationException
from lightning import Callback, Trainer, seed_everything
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import AnyNode, DictConfig, OmegaConf, open_dict
from torch import nn

from .callbacks import FirstBatch, MemoryProbe, PlannedSize, Progress, SameRun, Timing, Watch
from .classifier import Classifier
from .dashboards import OPTIONS, Options, media, wandb_id
from .data import MultiSizeDataModule, Views
from .data.mean_image import digest as mean_digest
from .differences import CHANGES, REFUSED, Difference, deciding, differences, machine, run_key
from .door import check, check_number, compose, dotted, nearest, own_conf
from .jobs import Job
from .models.initialise import weights_file
from .ranks import place
from .resume import AtomicCheckpointIO, History, ResumePoint
from .run import CHECKPOINTS, Run, find_checkpoint, run_folder

# What a run folder of somebody else's may build without being trusted in so many words: what our own configs name, and
# nets, optimizers, callbacks and loggers that are classes written in these modules. No function of others, but those
# that torchvision lists as nets: there are some that run code from anywhere.
OURS = frozenset(
    [
        *("spp_cls.models.sppnet", "spp_cls.borrowed.torchvision_net", "spp_cls.classifier.Classifier"),
        *("spp_cls.data.MultiSizeDataModule", "spp_cls.data.Views", "spp_cls.data.FullImage"),
        *(f"spp_cls.data.layouts.{name}" for name in ("folder", "table", "caltech101", "imagenet", "shapes")),
        *(f"spp_cls.data.sizes.{name}" for name in ("single", "alternating", "uniform", "per_batch", "growing")),
        *(f"spp_cls.schedules.{name}" for name in ("constant", "step", "plateau", "cosine", "one_cycle")),
    ]
)
OTHERS: dict[type, tuple[str, ...]] = {
    nn.Module: ("spp_cls.models.", "torch.nn.", "torchvision.models.", "timm."),
    torch.optim.Optimizer: ("torch.optim.",),
    Trainer: ("lightning.pytorch.trainer.",),
    Callback: ("lightning.pytorch.callbacks.",),
    Logger: ("lightning.pytorch.loggers.",),
}


def instantiate(config: Any, where: str, **arguments: Any) -> Any:
    """The object that `config` names; a ValueError of one line where `config` (called `where`) is wrong."""
    if OmegaConf.is_config(config):
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"{missing[0]} has no value: give one, like {missing[0]}=…")
        if "_target_" not in config:
            raise ValueError(f"{where} names nothing to build: give it a _target_, like package.module.Class")
    _check_arguments(config, where, arguments)
    try:
        if not arguments:
            return hydra.utils.instantiate(config, _convert_="all")
        # Objects are given by a call of their own: Hydra would merge them into the config, and make dicts of some.
        make = hydra.utils.instantiate(config, _partial_=True, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        lines = [line for line in str(cause or error).splitlines() if line.strip()]
        raise ValueError(f"{where}: {lines[0] if lines else error}") from error
    try:
        return make(**arguments)
    except TypeError as error:  # a value of a kind that nobody checked before
        raise ValueError(f"{where}: {error}") from error


def _check_arguments(config: Any, where: str, arguments: dict[str, Any]) -> None:
    """A key that its target does not take is named here, with the nearest that it does."""
    if not isinstance(config, DictConfig) or "_target_" not in config:
        return
    try:
        target = _locate(config._target_)  # hydra.utils.get_object, which logs besides
        signature = _signature(target)
    except ValueError:  # a builtin without a signature
        return
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}._target_={config._target_}: cannot be imported ({reason})") from error
    takes = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        given = [str(key) for key in config if not str(key).startswith("_")]
        for key in [*given, *arguments]:
            if key not in takes:
                raise ValueError(f"{where}.{key}: {config['_target_']} has no such argument{nearest(key, takes)}")
    for key in map(str, config):
        node = config._get_node(key)  # what stands there, for ${…} can perhaps not be worked out here
        word = node._value() if isinstance(node, AnyNode) and not node._is_interpolation() else None
        if isinstance(word, str) and key in takes and _is_number(takes[key].annotation):
            raise ValueError(f"{where}.{key}={word}: takes a number")
        _check_arguments(node, f"{where}.{key}", {})


def _signature(target: Any) -> inspect.Signature:
    """With annotations as types, where all that they name is to be had when a program runs."""
    try:
        return inspect.signature(target, eval_str=True)
    except ValueError:
        raise
    except Exception:
        return inspect.signature(target)


def _is_number(annotation: Any) -> bool:
    """Whether an argument of this type can be no word: int, float | None and the like."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = set(get_args(annotation) if is_union else (annotation,)) - {type(None), bool}
    return bool(kinds) and kinds <= {int, float}


def check_arguments(config: DictConfig) -> None:
    """Name a key that its target does not take before pictures are looked for, which may take minutes."""
    for group in ("model", "data", "sizes", "views", "optimizer", "schedule", "classifier", "trainer"):
        _check_arguments(config.get(group), group, {})
    for group in ("callbacks", "logger"):
        for name, one in (config.get(group) or {}).items():
            _check_arguments(one, f"{group}.{name}", {})


def check_run(config: DictConfig) -> None:
    """Refuse what can be known to be wrong of a run by its config alone, whatever machine it is for."""
    check_arguments(config)
    _check_trainer(config)
    _optimizer(config)
    _resume_point(config, Path())


METRICS = ("loss", "top1_error", "top5_error")


def check_metric(key: str, name: str, config: DictConfig) -> None:
    """Refuse before training a metric that the run of `config` will not have; what a user's callbacks log is theirs."""
    ours = ("spp_cls.", "lightning.")
    callbacks = [one for one in (config.get("callbacks") or {}).values() if isinstance(one, DictConfig)]
    others = [one for one in callbacks if not str(one.get("_target_")).startswith(ours)]
    split, _, last = name.partition("/")
    more = (config.get("data") or {}).get("val_sizes") if split == "val" else None
    sizes = ["", *(f"_{size}" for size in more or ())]
    known = [f"{part}/{metric}" for part in ("val", "train", "test") for metric in METRICS]
    is_known = split in ("train", "val", "test") and last in {f"{metric}{size}" for metric in METRICS for size in sizes}
    if not (is_known or others):
        near = nearest(name, known) or f"; use one of {', '.join(known)}"
        raise ValueError(f"{key}={name}: a run has no such metric{near}")
    if split == "test" and not config.test:
        raise ValueError(f"{key}={name}: with test=false there is none")


def build_datamodule(config: DictConfig) -> MultiSizeDataModule:
    """The datamodule of `config`, with its index made."""
    for key in ("data", "sizes", "views"):
        if key not in config or config[key] is None:
            raise ValueError(f"{key}: nothing chosen; give one, like {key}=…")
    sizes = instantiate(config.sizes, "sizes")
    if isinstance(sizes, functools.partial) and sizes.func.__module__.startswith("spp_cls."):
        # Hydra's own partials are looked at in every call: 0.2 ms, and 70 epochs of ImageNet have 700,000 batches.
        sizes = functools.partial(sizes.func, *sizes.args, **sizes.keywords)
    views = instantiate(config.views, "views")
    datamodule: MultiSizeDataModule = instantiate(config.data, "data", sizes=sizes, views=views)
    datamodule.setup()
    return datamodule


def build_net(config: DictConfig, num_classes: int) -> nn.Module:
    """The net of `config.model`."""
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed}: use a whole number from 0 to {2**32 - 1}")
    seed_everything(config.seed, verbose=False)  # nets that start by torch's own rules draw from the global state
    net: nn.Module = instantiate(config.model, "model", num_classes=num_classes)
    return net


def build_classifier(
    config: DictConfig, identity: dict[str, Any], class_weights: Sequence[float] | None = None
) -> Classifier:
    """The LightningModule of `config` for the classes and sizes that `identity` names."""
    classes = identity["classes"]
    if class_weights is not None and len(class_weights) != len(classes):
        raise ValueError(
            f"classifier.class_weights has {len(class_weights)} numbers for {len(classes)} classes: "
            "give one a class, or balanced, or null"
        )
    classifier: Classifier = instantiate(
        config.classifier,
        "classifier",
        class_weights=class_weights,
        net=build_net(config, len(classes)),
        optimizer=_optimizer(config),
        schedule=instantiate(config.schedule, "schedule"),
        val_sizes=identity["val_sizes"],
        identity=identity,
    )
    if config.compile:
        compile_net(classifier.net, config.compile_mode, bool(config.trainer.deterministic))
    return classifier


def _optimizer(config: DictConfig) -> Any:
    """What makes the optimizer of parameters; raises ValueError where it would refuse its settings then."""
    make = instantiate(config.optimizer, "optimizer")
    try:
        make([{"params": [nn.Parameter(torch.zeros(2, 2))]}])
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from None
    except Exception:  # one of the user's own may want other parameters; those of the net will say so
        pass
    return make


COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compile_net(net: nn.Module, mode: str | None, exact: bool, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile `net` in place, so that its weights keep their names: one graph for each shape of a training batch."""
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile_mode={mode}: use {', '.join(str(m) for m in COMPILE_MODES[1:])} or null")
    if exact and mode in COMPILE_MODES[3:]:
        raise ValueError(
            f"compile_mode={mode} chooses kernels by timing, so that bits may differ; add trainer.deterministic=false, "
            "or use reduce-overhead"
        )
    # Past its limit, 8, torch would go on uncompiled without a word; each size and kind of batch is a graph.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    net.compile(dynamic=False, mode=mode, backend=backend)


def class_weights(config: DictConfig, datamodule: MultiSizeDataModule) -> list[float] | None:
    """The weights that `classifier.class_weights` asks for; balanced is n / (K · n_k), each class the same in all."""
    chosen = config.classifier.class_weights
    if isinstance(chosen, str) and chosen != "balanced":
        raise ValueError(f"classifier.class_weights={chosen}: give a list of a number a class, or balanced, or null")
    if chosen != "balanced":
        return None if chosen is None else [float(weight) for weight in chosen]
    index = datamodule.index
    assert index is not None
    counts = torch.bincount(torch.from_numpy(index.labels[index.rows("train")]), minlength=len(index.classes))
    return [float(counts.sum() / (len(index.classes) * max(1, int(count)))) for count in counts]


def identity(config: DictConfig, datamodule: MultiSizeDataModule, trainer: Trainer | None = None) -> dict[str, Any]:
    """Plain data that says what a checkpoint's weights are: enough to build the net again and to feed it.

    With the `trainer` that trains it also on what.
    """
    mean = datamodule.mean
    return {
        "config": OmegaConf.to_container(config, resolve=True),
        "machine": machine(trainer) if trainer else {},
        "classes": list(datamodule.classes),
        "index": datamodule.index.digest if datamodule.index else None,
        "pixels": _pixels(datamodule),
        "val_sizes": list(datamodule.val_sizes),
        "region": datamodule.region,
        "resize": datamodule.resize,
        "mean": mean if isinstance(mean, torch.Tensor) else list(mean),
        "mean_image": mean_digest(mean) if isinstance(mean, torch.Tensor) else None,
        "std": list(datamodule.std),
    }


def key_of(config: DictConfig, datamodule: MultiSizeDataModule) -> str:
    """The hash of what decides the result of a run with `config`, in which nothing has been filled in yet."""
    assert datamodule.index is not None
    return run_key(_settings(config), datamodule.index.digest, _pixels(datamodule))


def what_decides(config: DictConfig) -> dict[str, Any]:
    """What `key_of` is the hash of, by dotted key, with the hash of the pictures' index."""
    datamodule = listed(config)
    assert datamodule.index is not None
    return {**deciding(_settings(config)), "index": datamodule.index.digest, "pixels": _pixels(datamodule)}


def _settings(config: DictConfig) -> dict[str, Any]:
    """The config of a run, resolved, without where the run lies, and with what is in the files that it starts from."""
    own = config.copy()
    for key in dotted(own):
        parent, _, last = key.rpartition(".")
        holder: Any = OmegaConf.select(own, parent) if parent else own
        node = holder._get_node(last)
        if not isinstance(node, DictConfig) and "${hydra:" in str(node._value()):
            holder[last] = None  # where the run lies, which decides nothing
    for key, file_of in (("model.init_from", weights_file), ("data.mean_image", Path)):
        path = OmegaConf.select(own, key)
        if isinstance(path, str) and file_of(path).is_file():  # else it is a word, or will be named as missing
            OmegaConf.update(own, key, f"{path}, {_contents(file_of(path), file_of(path).stat().st_mtime_ns)}")
    settings: Any = OmegaConf.to_container(own, resolve=True)
    return dict(settings)


@functools.lru_cache(maxsize=64)
def _contents(path: Path, changed: int) -> str:
    """A hash of the file; `changed` is when it was, for what is remembered."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()[:16]


def composed(words: Sequence[str]) -> DictConfig:
    """The config that `spp train` makes of `words`; raises ValueError where they are wrong."""
    words = [*words, *own_conf(list(words))]
    check("train", words)
    return compose("train", words)


def job_of(config: DictConfig, words: Sequence[str], folder: Path, name: str = "") -> Job:
    """The job of `spp train` with `words`, of which `config` is composed; its pictures must be there.

    `folder` is where its run would lie; `{key}` in it stands for the key.
    """
    datamodule = listed(config)
    last = Test(datamodule.sized(instantiate(config.views, "views")))
    tests = [last, *tests_of(config.tests, datamodule.region)] if config.test else []
    names = tuple(dict.fromkeys(test.name for test in tests))
    key = key_of(config, datamodule)
    scores = bool(config.keep_scores and names)
    return Job(tuple(words), key, Path(str(folder).replace("{key}", key)), names, name or key, scores)


def listed(config: DictConfig) -> MultiSizeDataModule:
    """The datamodule of `config`, for looking at its index: one for all configs whose pictures are the same."""
    of_data: Any = OmegaConf.to_container(config.data, resolve=True)
    same = json.dumps([{**of_data, "seed": None}, OmegaConf.to_container(config.sizes, resolve=True)], default=str)
    if same not in _datamodules:
        _datamodules[same] = build_datamodule(config)
    return _datamodules[same]


_datamodules: dict[str, MultiSizeDataModule] = {}  # of the jobs so far


def _pixels(datamodule: MultiSizeDataModule) -> str:
    return "jpeg cache" if datamodule.cache_kind == "jpeg" else "files"  # a raw cache has the files' pixels


class Test(NamedTuple):
    """A way to test: views of a size, of the pictures of a part."""

    views: Views
    split: str = "test"

    @property
    def name(self) -> str:
        """What it is called in result rows: ten_crop@224, and train/ten_crop@224 of training pictures."""
        part = "" if self.split == "test" else f"{self.split}/"
        return f"{part}{self.views.crops}@{self.views.size}"


def tests_of(texts: Sequence[str] | None, region: int) -> list[Test]:
    """The tests that `texts` name, like ten_crop, center_crop@180 and train/center_crop; without a size at `region`."""
    found = []
    for text in map(str, texts or ()):
        split, slash, rest = text.rpartition("/")
        crops, at, size = rest.partition("@")
        if (slash and split not in ("train", "val", "test")) or (at and not size.isdecimal()):
            raise ValueError(f"tests: {text}: write views, views@px or train/views@px, like center_crop@180")
        try:
            found.append(Test(Views(crops, int(size) if size else region), split or "test"))
        except ValueError as error:
            raise ValueError(f"tests: {text}: {error}") from None
    return found


def shapes_asked(datamodule: MultiSizeDataModule, tests: Sequence[Test]) -> list[tuple[str, tuple[int, int]]]:
    """What validation and `tests` give a net at the least (height, width), each with what asks for it."""
    sizes = [("data.val_sizes", size) for size in datamodule.val_sizes]
    sizes += [(test.name, test.views.smallest_side(datamodule.resize, datamodule.region)) for test in tests]
    return [(what, (size, size)) for what, size in sizes]


def build_trainer(config: DictConfig, folder: Path | None) -> Trainer:
    """A Trainer: to train into the run folder `folder`, or, without one, to test."""
    quieten()
    callbacks: list[Callback] = []
    loggers: list[Logger] = []
    if folder is not None:
        chosen = [instantiate(c, f"callbacks.{name}") for name, c in (config.get("callbacks") or {}).items() if c]
        timing = Timing(folder)
        callbacks = [SameRun(folder), PlannedSize(), MemoryProbe(), Watch(folder), timing, History(folder)]
        if config.trainer.get("enable_progress_bar") is not False:
            callbacks.append(Progress(timing))
        callbacks += [c for c in chosen if not isinstance(c, Checkpoint)]
        if not config.trainer.get("fast_dev_run"):
            callbacks += [c for c in chosen if isinstance(c, Checkpoint)]
            callbacks.append(_resume_point(config, folder / CHECKPOINTS))
        loggers = [build_logger(c, name, folder) for name, c in (config.get("logger") or {}).items() if c]
        if media(loggers):
            callbacks.append(FirstBatch(folder))
    elif sys.stderr.isatty():
        callbacks = [TQDMProgressBar(leave=False)]
    arguments: dict[str, Any] = {
        "logger": loggers or False,
        "callbacks": callbacks,
        # Lightning's own answer to a cluster's signals saves from inside a step.
        "plugins": [
            AtomicCheckpointIO(),
            *([SLURMEnvironment(auto_requeue=False)] if place().started_by == "SLURM" else []),
        ],
    }
    if folder is not None:
        arguments["default_root_dir"] = str(folder)
    elif not callbacks:
        arguments["enable_progress_bar"] = False
    check_devices(config)
    _check_trainer(config)
    settings = with_the_ranks_there_are(config.trainer)
    if settings.get("deterministic") is True and _takes_mps(settings.get("accelerator")):
        settings = settings.copy()
        settings.deterministic = "warn"  # as trainer=mps, which says why
    trainer: Trainer = instantiate(settings, "trainer", **arguments)
    return trainer


def _resume_point(config: DictConfig, folder: Path) -> ResumePoint:
    chosen = config.get("checkpoint") or {}
    for key in chosen:
        if key not in ("every_minutes", "every_steps"):
            raise ValueError(f"checkpoint.{key}: there is no such key; use every_minutes or every_steps")
    return ResumePoint(folder, **chosen)


def _takes_mps(accelerator: Any) -> bool:
    return accelerator in ("auto", "gpu", "mps") and not torch.cuda.is_available() and torch.backends.mps.is_available()


def with_the_ranks_there_are(config: DictConfig) -> DictConfig:
    """Devices and nodes as torchrun or SLURM has started processes for them."""
    here = place()
    if here.started_by not in ("torchrun", "SLURM") or here.ranks == 1:
        return config
    devices, nodes = here.on_this_machine, here.ranks // here.on_this_machine
    if config.devices not in ("auto", devices) or config.num_nodes not in (1, nodes):
        raise ValueError(
            f"trainer.devices={config.devices}, trainer.num_nodes={config.num_nodes}: {here.started_by} has started "
            f"{devices} processes on each of {nodes} machines; use trainer=ddp, which takes them as they are"
        )
    chosen = OmegaConf.merge(config, {"devices": devices, "num_nodes": nodes})
    assert isinstance(chosen, DictConfig)
    return chosen


def quieten() -> None:
    """Lightning's remarks (no TPU, a product of theirs; what of torch it uses that is deprecated) help no user."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # whose table was asked for
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)  # a rank ended amid its imports
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*exists and is not empty")  # a run that goes on
    warnings.filterwarnings("ignore", message=r"The dirpath has changed")  # ResumePoint sees to it
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode")  # a frozen backbone
    warnings.filterwarnings("ignore", message=r".*sync_dist=True")  # the errors are summed over the ranks already


PRECISIONS = (
    "32-true",
    "16-mixed",
    "bf16-mixed",
    "32",
    "16",
    "bf16",
    "transformer-engine",
    "transformer-engine-float16",
)


def _check_trainer(config: DictConfig) -> None:
    """Refuse what Lightning would take and do another thing with, or name nothing of."""
    trainer = config.trainer
    if trainer.get("max_steps", -1) != -1:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps}: ends inside an epoch, which has one size; use "
            "trainer.max_epochs, or trainer.limit_train_batches for short epochs"
        )
    precision = trainer.get("precision")
    if str(precision).endswith("-true") and str(precision) != "32-true" or str(precision) == "64":
        raise ValueError(
            f"trainer.precision={precision}: order and chance need float32; use 32-true, 16-mixed or bf16-mixed"
        )
    if precision is not None and str(precision) not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision}: use one of {', '.join(PRECISIONS)}")
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and clip < 0:
        raise ValueError(f"trainer.gradient_clip_val={clip}: use a number above 0, or null for no clipping")
    if trainer.get("limit_train_batches") == 0:
        raise ValueError("trainer.limit_train_batches=0: trains nothing; a run that is there is tested by spp evaluate")
    check_number("trainer.accumulate_grad_batches", trainer.get("accumulate_grad_batches"))


def check_devices(config: DictConfig) -> None:
    """Refuse devices that this machine does not have."""
    accelerator, devices = config.trainer.get("accelerator"), config.trainer.get("devices")
    there = torch.cuda.device_count() if accelerator in ("gpu", "cuda") else 0
    if there and str(devices).isdecimal() and int(devices) > there:
        raise ValueError(f"trainer.devices={devices}: {there} GPUs are to be seen here; use at most as many, or auto")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.accelerator={accelerator}: no GPU is to be seen here; use trainer=cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer.accelerator=mps: no Apple GPU is to be seen here; use trainer=cpu")


def build_logger(config: DictConfig, name: str, folder: Path) -> Logger:
    """A logger, and its options (see `dashboards.Options`), which it carries about.

    W&B goes on with the run of `folder`, and goes offline where there is no key, instead of failing.
    """
    kind = str(config.get("_target_", "")).rpartition(".")[2]
    config = config.copy()
    with open_dict(config):
        own = {key: config.pop(key) for key in OPTIONS.get(kind, ()) if key in config}
    try:
        options = Options(**own)
    except ValueError as error:
        raise ValueError(f"logger.{name}.{error}") from None
    if kind == "WandbLogger":
        os.environ.setdefault("WANDB_QUIET", "true")  # no summary: the program prints its own
        place_ = {"id": wandb_id(folder, config.get("id"))} if place().rank == 0 else {}  # the others log nothing
        offline = {} if _has_wandb_key() else {"offline": True}
        config = OmegaConf.merge(config, place_, offline, _wandb_folder(config, folder))  # type: ignore[assignment]
    logger: Logger = instantiate(config, f"logger.{name}")
    if kind in OPTIONS:
        logger.options = options  # type: ignore[attr-defined]
    return logger


def _wandb_folder(config: DictConfig, folder: Path) -> dict[str, str]:
    """WANDB_DIR where nothing else was asked for; not in the config, for a run goes on in another environment, too."""
    elsewhere, chosen = os.environ.get("WANDB_DIR"), config.get("save_dir")
    if not elsewhere or (chosen and Path(chosen).absolute() != folder.absolute()):
        return {}
    Path(elsewhere).mkdir(parents=True, exist_ok=True)
    return {"save_dir": elsewhere}


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.read_text(errors="replace") if netrc.is_file() else ""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname  # of one's own, whatever it is called
    return "wandb" in known or bool(server and server in known)


# Runs that are there already


def load_run(path: str | Path, which: str = "last", trust: bool = False) -> Run:
    """The run that `path` names, a run folder or a checkpoint; refused where it would build what is not trusted."""
    checkpoint = find_checkpoint(path, which)
    try:
        folder = run_folder(path)
    except ValueError:  # a checkpoint that lies by itself
        folder, source = checkpoint.parent, checkpoint
        config = read_checkpoint(checkpoint)["spp_cls"]["identity"]["config"]
    else:
        source = folder / "config.yaml"
        config = OmegaConf.to_container(OmegaConf.load(source), resolve=True)
    if not trust:
        refuse_untrusted(config, source)
    return Run(folder, {str(k): v for k, v in config.items()}, checkpoint)


def refuse_untrusted(config: Any, path: Path) -> None:
    """Raise where `config`, read from `path` and resolved, names a thing to build that is not trusted."""
    if isinstance(config, str) and "${" in config:  # which would become another thing when it is built
        raise ValueError(f"{path} holds {config!r}, which is worked out only later; add trust=true if you trust it")
    if isinstance(config, dict):
        target = config.get("_target_")
        if target is not None and not _is_trusted(target):
            raise ValueError(
                f"{path} would build {target}, which is not part of spp_cls; add trust=true if you trust it"
            )
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            refuse_untrusted(value, path)


def _is_trusted(target: Any) -> bool:
    """By where the class was written, not by its name alone: torch.nn.os.system is os.system."""
    if not isinstance(target, str) or target in OURS:
        return isinstance(target, str)
    packages = {module.partition(".")[0] for modules in OTHERS.values() for module in modules}
    if target.partition(".")[0] not in packages or any(part.startswith("_") for part in target.split(".")):
        return False  # and is not imported
    try:
        thing = _locate(target)
    except Exception:  # there is nothing of that name
        return False
    written = f"{getattr(thing, '__module__', None)}."
    if thing in map(torchvision.models.get_model_builder, torchvision.models.list_models(torchvision.models)):
        return True
    return isinstance(thing, type) and any(
        issubclass(thing, kind) and written.startswith(modules) for kind, modules in OTHERS.items()
    )


def load_classifier(checkpoint: Path, trust: bool = False) -> Classifier:
    """The classifier that `checkpoint` holds, in eval mode; neither its run folder nor its data need be there.

    `classifier.identity` has the names of its classes and what pictures are prepared by (region, resize, mean, std).
    """
    state = read_checkpoint(checkpoint)
    identity = state["spp_cls"]["identity"]
    if not trust:
        refuse_untrusted(identity["config"], checkpoint)
    config = OmegaConf.create(identity["config"])
    config.compile = False
    for key in ("init_from", "weights"):  # the checkpoint has them all
        if key in config.model:
            config.model[key] = None
    classifier = build_classifier(config, identity)
    try:
        classifier.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint}: its weights do not fit the net that its config builds now; it was trained by other code"
        ) from error
    return classifier.eval()


def restore_datamodule(run: Run, classifier: Classifier, root: str | None = None) -> MultiSizeDataModule:
    """The data of `run`, as its own config says; `root` if they have moved."""
    config = OmegaConf.create(run.config)
    if root is not None:
        config.data.root = root
    if "cache" in config.data:
        config.data.cache = None  # it is for training
    if "mean_image" in config.data:
        config.data.mean_image = None  # the checkpoint has it
    datamodule = build_datamodule(config)
    if classifier.identity.get("mean_image"):
        datamodule.mean = classifier.identity["mean"]
    trained_on = classifier.identity["classes"]
    if list(datamodule.classes) != list(trained_on):
        raise ValueError(
            f"{datamodule.root}: its {len(datamodule.classes)} classes are not the {len(trained_on)} that "
            f"{run.checkpoint} was trained on; give the data of that run, with root=…"
        )
    return datamodule


def refuse_elsewhere(config: dict[str, Any], folder: Path, path: Path) -> None:
    """Raise where callbacks or loggers, named by what was read from `path`, would write outside the run's `folder`."""
    home = folder.resolve()

    def look(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, nested in value.items():
                look(nested, str(name))
        elif isinstance(value, list):
            for nested in value:
                look(nested, key)
        elif isinstance(value, str):
            there = Path(os.path.expandvars(value)).expanduser()
            is_folder = key.endswith(("dir", "path", "folder", "root"))  # else only what leads out of where it begins
            leads_out = there.is_absolute() or ".." in there.parts
            if (is_folder or leads_out) and not there.resolve().is_relative_to(home):
                raise ValueError(
                    f"{path} would write to {value}, outside its run folder; add trust=true if you trust it"
                )

    look([config.get("callbacks"), config.get("logger")])


def differences_from(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """What differs between the identity of `checkpoint` and that of a command; raises where it cannot go on."""
    found = differences(before, now)
    refused = next((one for one in found if one.kind == REFUSED), None)
    if refused is not None:
        raise ValueError(f"ckpt_path={checkpoint}: {refused.refusal}")
    return found


@dataclass(frozen=True)
class Saved:
    """Of a checkpoint what its run was, and how far it had come; not its weights, which are read when they are used."""

    checkpoint: Path
    identity: dict[str, Any]
    step: int
    epochs: int  # that are done


def read_saved(checkpoint: Path) -> Saved:
    """What `checkpoint` says of its run."""
    state = read_checkpoint(checkpoint)
    epochs = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return Saved(checkpoint, state["spp_cls"]["identity"], int(state["global_step"]), int(epochs))


def refuse_to_go_back(saved: Saved, config: DictConfig) -> None:
    """Raise where more epochs are done than `config` asks for."""
    done, wanted = saved.epochs, config.trainer.get("max_epochs")
    if wanted is not None and -1 < wanted < done:
        raise ValueError(f"trainer.max_epochs={wanted}: {done} epochs are done; give {done} to test, or more to go on")


def stop_again_only_as_before(trainer: Trainer, found: list[Difference]) -> None:
    """A run that was stopped early stays so, unless it goes on with other callbacks, or further."""
    changed = any(one.key.startswith(("callbacks.", "trainer.max_")) and one.kind == CHANGES for one in found)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ResumePoint):
            callback.stays_stopped = not changed


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, read without running any code in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason[:120]})") from error
    if not isinstance(state, dict) or "state_dict" not in state or "spp_cls" not in state:
        raise ValueError(f"{path}: not a checkpoint of spp_cls; name one that spp train wrote")
    return state
