"""What pages of 2 MB (THP_MEM_ALLOC_ENABLE=1, which spp_cls sets) change in a training step on a CPU.

    python scripts/bench_pages.py --model tiny --batch-size 32

Each round starts one process with and one without, in turn; medians of their steps' CPU time, one thread. Ends with a
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

STEP = """
import hashlib, statistics, sys, time, torch
from spp_cls.models import sppnet
torch.set_num_threads(1)
torch.manual_seed(0)
model, images, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net = sppnet(model, num_classes=102).to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
batch = torch.randn(images, 3, 224, 224).contiguous(memory_format=torch.channels_last)
labels = torch.arange(images) % 102
seconds = []
for _ in range(steps):
    began = time.process_time()
    torch.manual_seed(1)
    torch.nn.functional.cross_entropy(net(batch), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.process_time() - began)
weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
print(statistics.median(seconds), hashlib.sha256(weights).hexdigest())
"""


def seconds_and_weights(pages: str, model: str, images: int, steps: int) -> tuple[float, str]:
    """Median seconds of a step, and the hash of the weights after all of them."""
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": pages, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STEP, model, str(images), str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    median, weights = done.stdout.split()
    return float(median), weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, str]]] = {"0": [], "1": []}
    for _ in range(arguments.rounds):
        for pages in found:
            found[pages].append(seconds_and_weights(pages, arguments.model, arguments.batch_size, arguments.steps))
    ratios = [before[0] / after[0] for before, after in zip(found["0"], found["1"], strict=True)]
    result = {
        "script": "bench_pages",
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "ms_without": round(1e3 * statistics.median(s for s, _ in found["0"]), 1),
        "ms_with": round(1e3 * statistics.median(s for s, _ in found["1"]), 1),
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
        "same_weights": len({weights for each in found.values() for _, weights in each}) == 1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
