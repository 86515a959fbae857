"""Compare finished runs in pairs of one seed: mean difference of a metric between two values of a config key.

    spp train -m model.levels=[1],[6,3,2,1] seed=0,1,2,3,4
    python scripts/compare_runs.py multiruns/shapes-tiny/<date>_<time>_… --key model.levels

The interval is Student's, at 95 %, over the seeds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy import stats


def read(folder: Path, key: str, metric: str) -> dict[str, dict[int, float]]:
    """Value of `key` → seed → metric, of all finished runs below `folder`; raises ValueError where two are the same."""
    found: dict[str, dict[int, float]] = {}
    for results in sorted(folder.glob("**/results.json")):
        config = results.parent / "config.yaml"
        if not config.is_file():  # an evaluation, not a run
            continue
        settings = OmegaConf.load(config)
        value = OmegaConf.select(settings, key)
        numbers: dict[str, Any] = json.loads(results.read_text())
        name = json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
        by_seed = found.setdefault(name, {})
        if settings.seed in by_seed:
            raise ValueError(f"{results.parent}: a second run of {key}={name} and seed {settings.seed}; move one away")
        if metric not in numbers:
            raise ValueError(f"{results}: has no {metric}; use one of {', '.join(n for n in numbers if '/' in n)}")
        by_seed[int(settings.seed)] = float(numbers[metric])
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key", default="model.levels", help="the config key that differs (default: %(default)s)")
    parser.add_argument("--metric", default="test/top1_error", help="a name in results.json (default: %(default)s)")
    arguments = parser.parse_args()

    try:
        found = read(arguments.folder, arguments.key, arguments.metric)
    except ValueError as error:
        parser.error(str(error))
    if len(found) < 2:
        parser.error(f"{arguments.folder}: {len(found)} values of {arguments.key} in finished runs; two are compared")
    report: dict[str, Any] = {"metric": arguments.metric, "key": arguments.key, "values": {}, "differences": {}}
    for name, by_seed in found.items():
        mean, half = interval(list(by_seed.values()))
        report["values"][name] = {"n": len(by_seed), "mean": mean, "half": half, "by_seed": by_seed}
        print(f"{arguments.key}={name}: {mean:.2f} ± {half:.2f} (n={len(by_seed)})")
    names = sorted(found)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            seeds = sorted(found[first].keys() & found[second].keys())
            mean, half = interval([found[first][seed] - found[second][seed] for seed in seeds])
            report["differences"][f"{first} - {second}"] = {"n": len(seeds), "mean": mean, "half": half}
            print(f"{first} − {second}: {mean:+.2f} ± {half:.2f} (n={len(seeds)} pairs)")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
