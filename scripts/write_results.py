"""Write the tables of docs/results.md anew, from result rows: no number there is typed in.

    python scripts/write_results.py docs/results.md

Before each of its tables stands a comment `<!-- spp table NAME … -->`. The command is run with `run=false`, and what
stands between it and `<!-- end -->` becomes the table that it writes; figures go to the folder of its `output=`.
Likewise `<!-- csv FILE -->` for a CSV file, which lies beside the file or below.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

TABLE = re.compile(r"(<!-- spp (table .+?) -->\n).*?(<!-- end -->)", re.DOTALL)
CSV = re.compile(r"(<!-- csv (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written_anew(text: str, folder: Path) -> str:
    """`text`, of a file in `folder`, with each table as its command or its CSV file gives it now."""

    def table(marked: re.Match[str]) -> str:
        words = shlex.split(" ".join(marked[2].split()))
        output = next((Path(word.partition("=")[2]) for word in words if word.startswith("output=")), None)
        if output is None:
            sys.exit(f"{marked[2]}: say where the figures go, like output=docs/results/table2")
        subprocess.run([sys.executable, "-m", "spp_cls", *words, "run=false"], check=True, stdout=subprocess.DEVNULL)
        return f"{marked[1]}\n{(output / 'table.md').read_text()}\n{marked[3]}"

    def listed(marked: re.Match[str]) -> str:
        head, *rows = csv.reader((folder / marked[2]).read_text().splitlines())
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        return marked[1] + "\n".join(["", *lines, "", marked[3]])

    return CSV.sub(listed, TABLE.sub(table, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    file.write_text(written_anew(file.read_text(), file.parent))


if __name__ == "__main__":
    main()
