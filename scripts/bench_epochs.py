"""Whole epochs of training: `spp train` beside timm's train.py and torchvision's reference loop.

    python scripts/bench_epochs.py --root PICTURES --timm CHECKOUT --torchvision FOLDER

PICTURES has files *.jpg at any depth (data/caltech101). CHECKOUT is one of pytorch-image-models, FOLDER is
references/classification of pytorch/vision; without the one or the other that peer is left out. timm wants
huggingface_hub and safetensors besides.

All train the same net on the same copied pictures at 224 px: batch 32, as many steps, SGD with momentum, one thread and
one loader worker, on the CPU. Ours has the pyramid {6,3,2,1} where the others pool last, and otherwise their head: two
layers of 4,096 for AlexNet, none for ResNet-18. With these two the net limits. With `patches`, which is written here,
the loader does. Each cuts as it does by itself: timm and torchvision a region of any size and shape, resized to 224 px,
we 224 px of the picture resized to 256.

Each program runs in a process of its own, as it is but for two additions: nets that its list lacks, and a hook of torch
that notes, after the last step of each epoch, the CPU time of all its processes and the wall time. An epoch reaches
from last step to last step, so it holds the start of the loader and a validation of one picture, which timm is told to
skip; writing checkpoints is taken out and told apart. The first epoch does not count.

A variant is a program and flags, as in timm+bf16+compile: see FLAGS. In each round each variant runs once, in an order
of chance; ratios are taken within a round, to the best peer of that round, and given as medians. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

BATCH, SIZE, CLASSES, LEARNING_RATE = 32, 224, 20, 1e-3
LEVELS = (6, 3, 2, 1)
SAME = {"alexnet": ["model.levels=[6]"], "resnet18": ["model.levels=[1]", "model.pool=average"], "patches": []}
BIG_PAGES = "THP_MEM_ALLOC_ENABLE"  # spp_cls sets it to 1 where it is not set, but here torch is imported first
# What a variant can add to its program, by name. Those of pages set an environment variable; `same` pools as the peers.
FLAGS: dict[str, dict[str, list[str]]] = {
    "timm": {
        "channels_last": ["--channels-last"],
        "bf16": ["--amp", "--amp-dtype", "bfloat16"],
        "compile": ["--torchcompile"],
        "fused": ["--opt-kwargs", "fused=True"],
        "no_jitter": ["--color-jitter", "0"],
        "bilinear": ["--train-interpolation", "bilinear"],
        "no_prefetcher": ["--no-prefetcher"],
        "pages": [],
    },
    "torchvision": {"tensor": ["--backend", "tensor"], "v2": ["--use-v2"], "amp": ["--amp"], "pages": []},
    "ours": {
        "bf16": ["trainer.precision=bf16-mixed"],
        "compile": ["compile=true"],
        "inexact": ["trainer.deterministic=false"],
        "raw": ["data.cache=raw", "data.num_workers=thread"],
        "same": [],
        "small_pages": [],
    },
}
BEST_TIMM = "timm+channels_last+bf16+fused+no_jitter+bilinear"  # of what was tried: compiled it is slower
# Net → pictures, and the variants that are run where nothing else is said.
REGIMES: dict[str, tuple[int, list[str]]] = {
    "alexnet": (320, ["torchvision", BEST_TIMM, "ours+bf16", "ours+bf16+same"]),
    "resnet18": (320, ["torchvision", BEST_TIMM, "ours+bf16", "ours+bf16+same"]),
    "patches": (1536, ["torchvision", "timm+no_jitter+bilinear", "ours", "ours+raw"]),
}


# Nets


def patches(num_classes: int, **_: Any) -> nn.Module:
    """As little of a convolutional net as sees the whole picture."""
    layers = nn.Sequential(
        nn.Conv2d(3, 24, 8, stride=8), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU()
    )
    return nn.Sequential(layers, nn.AdaptiveMaxPool2d(6), nn.Flatten(), nn.Linear(48 * 36, num_classes))


def patches_under_pyramid(num_classes: int) -> nn.Module:
    from spp_cls.borrowed import convolutions
    from spp_cls.models import SPPNet

    layers = next(patches(num_classes).children())
    return SPPNet(convolutions(layers), num_classes, LEVELS, fc=())


def alexnet(num_classes: int, **_: Any) -> nn.Module:
    return torchvision.models.alexnet(num_classes=num_classes)


def own_milliseconds(net: nn.Module, steps: int) -> float:
    """CPU time a picture of forward, backward and a step of a net alone, float32, channels_last."""
    net = net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=0.9, fused=True)
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % CLASSES
    times = []
    for _ in range(steps + 1):
        began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        times.append(time.process_time() - began)
    return 1000 * statistics.median(times[1:]) / BATCH


# In a process of a program


def inside(report: Path, steps: int, program: str, arguments: list[str]) -> None:
    """Run `program` as if it had been started by itself, and note in `report` when its epochs end."""
    torch.set_num_threads(1)
    taken, saving = 0, {"wall": 0.0, "cpu": 0.0}

    def note(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 1 or taken % steps == 0:
            now = {"step": taken, "wall": time.monotonic(), "cpu": tree_seconds()}
            now |= {f"saving_{clock}": seconds for clock, seconds in saving.items()}
            with report.open("a") as file:
                file.write(json.dumps(now) + "\n")

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                saving["wall"] += time.perf_counter() - wall
                saving["cpu"] += time.thread_time() - cpu

        return call

    register_optimizer_step_post_hook(note)
    torch.save, os.fsync = timed(torch.save), timed(os.fsync)
    sys.argv = [program, *arguments]
    if program == "spp":
        from spp_cls.__main__ import main as spp

        return spp(arguments)
    sys.path.insert(0, str(Path(program).parent))
    if "timm" in Path(program).read_text():
        from timm.models import register_model  # type: ignore[import-not-found,unused-ignore]

        for net in (patches, alexnet):  # timm has none of that name
            register_model(net)
    else:
        torchvision.models._api.register_model()(patches)
    runpy.run_path(program, run_name="__main__")


def tree_seconds() -> float:
    """CPU time of this process, its children and theirs, those that have ended too."""
    here = os.times()
    ticks, children = os.sysconf("SC_CLK_TCK"), family()
    live, waiting = 0.0, list(children.get(os.getpid(), []))
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        fields = stat_of(pid)
        live += sum(map(int, fields[11:15])) / ticks if fields else 0
    return here.user + here.system + here.children_user + here.children_system + live


def family() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := stat_of(int(folder.name)):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    return children


def stat_of(pid: int) -> list[str]:
    """What /proc says of a process behind its name, beginning with its state; nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


# Commands


def command(variant: str, net: str, pictures: Path, epochs: int, work: Path, peers: dict[str, Path]) -> list[str]:
    """Program and arguments of a variant."""
    program, *flags = variant.split("+")
    more = [argument for flag in flags for argument in FLAGS[program][flag]]
    if program == "timm":
        chosen: dict[str, Any] = {"data-dir": pictures, "train-split": "train", "val-split": "", "model": net}
        chosen |= {"num-classes": CLASSES, "batch-size": BATCH, "epochs": epochs, "workers": 1, "device": "cpu"}
        chosen |= {"opt": "momentum", "momentum": 0.9, "weight-decay": 5e-4, "lr": LEARNING_RATE, "sched": "step"}
        chosen |= {"warmup-epochs": 0, "smoothing": 0, "output": work / "timm", "val-interval": 1000}
        size = ["--input-size", "3", str(SIZE), str(SIZE)]
        return [str(peers["timm"] / "train.py"), *options(chosen), *size, *more]
    if program == "torchvision":
        chosen = {"data-path": pictures, "model": net, "batch-size": BATCH, "epochs": epochs, "workers": 1}
        chosen |= {"device": "cpu", "opt": "sgd", "momentum": 0.9, "weight-decay": 5e-4, "lr": LEARNING_RATE}
        return [str(peers["torchvision"] / "train.py"), *options(chosen | {"output-dir": work / "torchvision"}), *more]
    ours = ["train", "data=folder", f"data.root={pictures}", f"data.batch_size={BATCH}", "data.num_workers=1"]
    ours += [f"data.region={SIZE}", f"data.cache_folder={work / 'cache'}", "sizes=single", "optimizer=sgd"]
    ours += ["schedule=constant", f"optimizer.lr={LEARNING_RATE}", "trainer=cpu", "trainer.gradient_clip_val=null"]
    ours += [f"trainer.max_epochs={epochs}", "logger=null", "callbacks=none", "test=false"]
    ours += [f"hydra.run.dir={work / 'ours'}", "model=" + ("patches" if net == "patches" else "torchvision")]
    ours += [f"model.name={net}", f"model.levels=[{','.join(map(str, LEVELS))}]"] if net != "patches" else []
    ours += ["model.fc=[4096,4096]", "model.dropout=0.5"] if net == "alexnet" else []
    return ["spp", *ours, *more, *(SAME[net] if "same" in flags else [])]


def options(chosen: dict[str, Any]) -> list[str]:
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def run(
    variant: str, net: str, pictures: Path, images: int, peers: dict[str, Path], epochs: int, limit: float
) -> dict[str, Any]:
    """What the epochs of one run cost, all but the first."""
    steps = images // BATCH
    program, *flags = variant.split("+")
    big_pages = "small_pages" not in flags if program == "ours" else "pages" in flags
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", BIG_PAGES: str(int(big_pages))}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(pictures.parent / "inductor")  # compiled once, in the first round
    with tempfile.TemporaryDirectory(dir=pictures.parent) as folder:
        work = Path(folder)
        (work / "conf/model").mkdir(parents=True)
        (work / "conf/model/patches.yaml").write_text("_target_: bench_epochs.patches_under_pyramid\n")
        program, *arguments = command(variant, net, pictures, epochs, work, peers)
        report, timing = work / "report.jsonl", work / "ours/timing.jsonl"
        line = [sys.executable, str(Path(__file__).resolve()), "--inside", str(report), str(steps), program, *arguments]
        began = time.monotonic()
        done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, timeout=limit)
        notes, timed = read_lines(report), read_lines(timing)
    ends = [note for note in notes if note["step"] % steps == 0]
    if done.returncode or len(ends) != epochs:
        print(" ".join([program, *arguments]), done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise RuntimeError(f"{variant} on {net} ended with {done.returncode} after {len(ends)} of {epochs} epochs")
    found: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        seconds = [b[clock] - a[clock] for a, b in zip(ends, ends[1:], strict=False)]
        saves = [b[f"saving_{clock}"] - a[f"saving_{clock}"] for a, b in zip(ends, ends[1:], strict=False)]
        found[f"{clock}_s"] = statistics.median(s - save for s, save in zip(seconds, saves, strict=True))
        found[f"saving_{clock}_s"] = statistics.median(saves)
        found[f"images_per_{clock}_s"] = images / found[f"{clock}_s"]
        found[f"first_step_{clock}_s"] = notes[0][clock] - (began if clock == "wall" else 0)
    waiting = [epoch["waiting_for_data"] for epoch in timed[1:]]
    return found | ({"waiting": statistics.median(waiting)} if waiting else {})


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# The measurement


def copy_pictures(files: list[Path], root: Path, number: int) -> None:
    """`number` of the files for training, one for validation and one for our test, which is not run."""
    for i, file in enumerate(files[: number + 2]):
        split = "train" if i < number else ("val", "test")[i - number]
        path = root / split / f"class_{i % CLASSES:02d}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)


def nets(net: str) -> dict[str, nn.Module]:
    """The peers' net and ours."""
    if net == "patches":
        return {"peers": patches(CLASSES), "ours": patches_under_pyramid(CLASSES)}
    from spp_cls.borrowed import torchvision_net

    head: dict[str, Any] = {"fc": (4096, 4096), "dropout": 0.5} if net == "alexnet" else {}
    theirs = torchvision.models.get_model(net, num_classes=CLASSES)
    return {"peers": theirs, "ours": torchvision_net(net, CLASSES, levels=LEVELS, **head)}


def measure(net: str, variants: list[str], files: list[Path], work: Path, arguments: Any) -> dict[str, Any]:
    images = (arguments.number or REGIMES[net][0]) // BATCH * BATCH
    pictures = work / net
    copy_pictures(files, pictures, images)
    result: dict[str, Any] = {"pictures": images, "steps": images // BATCH, "nets": {}}
    for name, module in nets(net).items():
        own = own_milliseconds(module, 200 if net == "patches" else 2)
        parameters = sum(p.numel() for p in module.parameters())
        result["nets"][name] = {"own_ms_per_image": round(own, 3), "parameters": parameters}
    chance = random.Random(arguments.seed)
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    peers = {"timm": arguments.timm, "torchvision": arguments.torchvision}
    for number in range(arguments.rounds):
        for variant in chance.sample(variants, len(variants)):
            one = run(variant, net, pictures, images, peers, arguments.epochs, arguments.limit)
            found[variant].append(one)
            print(
                f"{net}, round {number + 1}, {variant}: {one['images_per_cpu_s']:.1f} images a CPU second, "
                f"{one['images_per_wall_s']:.1f} a second",
                file=sys.stderr,
            )
    for variant, rounds in found.items():
        row: dict[str, Any] = {key: round(statistics.median(one[key] for one in rounds), 4) for key in rounds[0]}
        # The first run compiles, where there is anything to compile; further ones find it in a cache.
        row |= {f"first_start_{clock}_s": round(rounds[0][f"first_step_{clock}_s"], 1) for clock in ("cpu", "wall")}
        row["all_images_per_cpu_s"] = [round(one["images_per_cpu_s"], 1) for one in rounds]
        others = [name for name in variants if not name.startswith("ours")]
        for clock in ("cpu", "wall") if others else ():
            key = f"images_per_{clock}_s"
            ratios = [one[key] / max(found[o][i][key] for o in others) for i, one in enumerate(rounds)]
            row[f"ratio_{clock}"] = round(statistics.median(ratios), 3)
            row[f"least_ratio_{clock}"] = round(min(ratios), 3)
        result[variant] = row
    shutil.rmtree(pictures)
    return result


def print_table(net: str, result: dict[str, Any]) -> None:
    about = "; ".join(f"{name} {n['own_ms_per_image']:.2f} ms a picture" for name, n in result["nets"].items())
    print(f"\n{net}: {result['pictures']} pictures, {result['steps']} steps; the net alone: {about}")
    print(
        f"{'':58}{'images/CPU s':>13}{'/s':>8}{'ratio CPU':>11}{'wall':>7}{'save s':>8}{'1st step s':>11}{'waits':>7}"
    )
    for variant, row in result.items():
        if isinstance(row, dict) and "images_per_cpu_s" in row:
            line = f"{variant:58}{row['images_per_cpu_s']:13.1f}{row['images_per_wall_s']:8.1f}"
            line += f"{row.get('ratio_cpu', 0):11.2f}{row.get('ratio_wall', 0):7.2f}{row['saving_wall_s']:8.2f}"
            line += f"{row['first_start_wall_s']:11.1f}"
            print(line + (f"{row['waiting']:7.0%}" if "waiting" in row else ""))


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        report, steps, program, *rest = sys.argv[2:]
        return inside(Path(report), int(steps), program, rest)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="take the files *.jpg below this folder")
    parser.add_argument("--timm", type=Path, help="a checkout of pytorch-image-models")
    parser.add_argument("--torchvision", type=Path, help="references/classification of pytorch/vision")
    parser.add_argument("--nets", nargs="+", choices=[*REGIMES], default=[*REGIMES], help="(default: all)")
    parser.add_argument("--variants", nargs="+", help="instead of those that were found best")
    parser.add_argument("--number", type=int, help="pictures, in whole batches")
    parser.add_argument("--epochs", type=int, default=3, help="of a run, with the one left out (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a run at most (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="where the temporary folder is made")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and order (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.epochs < 2 or arguments.rounds < 1:
        parser.error(f"--epochs={arguments.epochs} --rounds={arguments.rounds}: give at least 2 and 1")
    for variant in arguments.variants or ():
        program, *flags = variant.split("+")
        if program not in FLAGS or not set(flags) <= FLAGS[program].keys():
            parser.error(
                f"--variants {variant}: give one of {', '.join(FLAGS)}, and + before each of its flags, "
                + "; ".join(f"{name}: {', '.join(known)}" for name, known in FLAGS.items())
            )
    for name in ("timm", "torchvision"):
        folder = getattr(arguments, name)
        if folder is not None and not (folder / "train.py").is_file():
            parser.error(f"--{name}={folder}: has no train.py")
        setattr(arguments, name, folder and folder.resolve())
    files = sorted(arguments.root.glob("**/*.jpg"))
    most = max(arguments.number or REGIMES[net][0] for net in arguments.nets) + 2
    if len(files) < most:
        parser.error(f"--root={arguments.root}: has {len(files)} files *.jpg, {most} are needed; give a lower --number")
    random.Random(arguments.seed).shuffle(files)
    torch.set_num_threads(1)
    report: dict[str, Any] = {"script": "bench_epochs", "torch": torch.__version__, "epochs": arguments.epochs - 1}
    report |= {"rounds": arguments.rounds, "batch": BATCH, "size": SIZE, "nets": {}}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for net in arguments.nets:
            wanted = arguments.variants or REGIMES[net][1]
            there = [v for v in wanted if v.startswith("ours") or getattr(arguments, v.split("+")[0])]
            result = measure(net, there, files, Path(folder), arguments)
            print_table(net, result)
            report["nets"][net] = result
    print(json.dumps(report))


if __name__ == "__main__":
    main()
