"""Where two tests of the same nets differ: their errors by the aspect ratio of the pictures, as CSV.

    python scripts/by_aspect.py results/zf5_caltech101.jsonl --test full_image@224 --against center_crop@224 \
        --settings experiment=table2b_single_size --output docs/results/full_image_by_aspect.csv data=caltech101

The words at the end are those of `spp train` that say which pictures were tested. A run counts if it was trained with
all of `--settings` on those pictures; the interval is Student's over the runs, 95 %.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spp_cls import build
from spp_cls.door import register_resolvers
from spp_cls.intervals import mean_interval, signed
from spp_cls.results import find_test, read_rows, wrong
from spp_cls.whole import write_whole

EDGES = (1, 1.05, 1.2, 1.35, 1.5, 1.8, math.inf)  # longer side over shorter side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--test", required=True)
    parser.add_argument("--against", required=True)
    parser.add_argument("--settings", nargs="+", default=[])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_intermixed_args()

    register_resolvers()
    index = build.build_datamodule(build.composed([*arguments.words, "data.cache=null"])).index
    assert index is not None
    tested = index.rows("test")
    sides = np.stack([index.widths[tested], index.heights[tested]])
    ratios = sides.max(0) / sides.min(0)

    pairs: list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]] = []  # of each run: wrong in the test, against
    for row in read_rows([arguments.rows]).values():
        test, against = find_test(row, arguments.test), find_test(row, arguments.against)
        if row["index"] == index.digest and {*arguments.settings} <= {*row["settings"]} and test and against:
            pairs.append((wrong(test), wrong(against)))
    if len(pairs) < 2:
        parser.error(f"{arguments.rows}: {len(pairs)} runs of these pictures have {arguments.settings} and both tests")

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["aspect ratio", "pictures", f"{arguments.against}, %", f"{arguments.test}, %", f"difference, n = {len(pairs)}"]
    )
    for least, below in zip(EDGES, EDGES[1:], strict=False):
        here = (ratios >= least) & (ratios < below)
        if not here.any():
            continue
        errors = [[100 * float(one[here].mean()) for one in pair] for pair in pairs]
        difference = mean_interval([test - against for test, against in errors])
        name = f"{least} to {below}" if below < math.inf else f"{least} and more"
        means = [f"{np.mean([error[i] for error in errors]):.1f}" for i in (1, 0)]
        table.writerow([name, int(here.sum()), *means, f"{signed(difference.mean)} ± {difference.half:.2f}"])
    write_whole(arguments.output, text.getvalue())
    print(text.getvalue(), end="")


if __name__ == "__main__":
    main()
