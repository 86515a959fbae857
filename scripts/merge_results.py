"""Put result rows of several files and machines into one file: a line a run, with all of its tests.

    python scripts/merge_results.py /elsewhere/results/*.jsonl --output results/caltech101.jsonl

Rows that the output has already are kept. A run that was trained twice keeps the row of more tests.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from filelock import FileLock

from spp_cls.results import read_rows
from spp_cls.whole import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    missing = [file for file in arguments.files if not file.is_file()]
    if missing:
        parser.error(f"{missing[0]}: there is no such file")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{arguments.output}.lock"):  # a table may be adding to it
        before = [arguments.output] if arguments.output.is_file() else []
        try:
            rows = read_rows([*before, *arguments.files])
        except ValueError as error:
            parser.error(str(error))
        write_whole(arguments.output, "".join(f"{json.dumps(row)}\n" for row in rows.values()))
    print(f"{arguments.output}: {len(rows)} runs, {sum(len(row['tests']) for row in rows.values())} tests")


if __name__ == "__main__":
    main()
