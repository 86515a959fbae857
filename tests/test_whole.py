"""Files written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from spp_cls.whole import write_json, write_whole, written_whole


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "results.json"
    write_json(path, {"error": 1.5, "folder": tmp_path})
    assert json.loads(path.read_text()) == {"error": 1.5, "folder": str(tmp_path)}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError):
            write_json(path, {"error": 2.5})
    assert json.loads(path.read_text())["error"] == 1.5

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"error": 2.5})
    assert json.loads(path.read_text())["error"] == 1.5
    with pytest.raises(TypeError):
        write_json(path, {("no", "key"): 1})
    assert json.loads(path.read_text())["error"] == 1.5
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_what_is_written_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with written_whole(path, ".onnx") as beside:
        beside.write_bytes(b"half")
        assert beside.parent == tmp_path and beside.suffix == ".onnx" and not path.exists()
        beside.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    with pytest.raises(ZeroDivisionError), written_whole(path) as beside:
        beside.write_bytes(b"other")
        raise ZeroDivisionError
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_a_pipe_is_no_file_to_replace(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
