"""scripts/write_results.py: what stands between the marks is written anew, and nothing else."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "write_results.py"


def test_tables_and_lists_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> None:
        asked.append(command[3:])
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "table.md").write_text("| new |\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text('x,"y, %"\n1,2\n')
    text = "before\n<!-- spp table table2 seeds=2\n     output=out -->\nold\n<!-- end -->\n"
    text += "<!-- csv a.csv -->\n<!-- end -->\nafter\n"
    written_anew = runpy.run_path(str(SCRIPT))["written_anew"]
    once = written_anew(text, tmp_path)
    assert once == (
        "before\n<!-- spp table table2 seeds=2\n     output=out -->\n\n| new |\n\n<!-- end -->\n"
        "<!-- csv a.csv -->\n\n| x | y, % |\n| --- | --- |\n| 1 | 2 |\n\n<!-- end -->\nafter\n"
    )
    assert written_anew(once, tmp_path) == once
    assert asked == [["table", "table2", "seeds=2", "output=out", "run=false"]] * 2
    with pytest.raises(SystemExit, match="say where the figures go"):
        written_anew("<!-- spp table table2 -->\n<!-- end -->", tmp_path)
