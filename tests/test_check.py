"""`spp check`: its numbers by hand, each bad file with its reason, and that nothing is read twice or written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Answer, Spp
from omegaconf import OmegaConf
from PIL import Image

from spp_cls.check import report, run, text
from spp_cls.data import Index, facts, make_index
from spp_cls.data.index import Bad
from spp_cls.data.layouts import folder

Check = Callable[..., Answer]

SIZES = {  # upright
    "train/a/0.jpg": (60, 40),
    "train/a/1.png": (36, 40),
    "train/a/2.jpg": (20, 80),
    "train/b/0.png": (90, 30),
    "train/b/1.png": (32, 32),  # grey
    "val/a/0.png": (35, 40),
    "val/b/0.png": (31, 40),
    "test/a/0.jpg": (40, 40),
    "test/b/0.jpg": (50, 40),  # stored on its side
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Nine pictures, each of its own content."""
    chance = np.random.default_rng(0)
    side = Image.Exif()
    side[274] = 6
    for path, (width, height) in SIZES.items():
        turned = path == "test/b/0.jpg"
        shape = (width, height, 3) if turned else (height, width, 3)
        image = Image.fromarray(chance.integers(0, 256, shape, np.uint8))
        file = tmp_path / "pictures" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image = image.convert("L") if path == "train/b/1.png" else image
        image.save(file, **({"exif": side} if turned else {}))
    return tmp_path / "pictures"


@pytest.fixture
def check(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """`check(key=value, …)` of these pictures, without the door: to compose a config takes longer than to read them."""
    layout = {"_target_": "spp_cls.data.layouts.folder", "_partial_": True}
    data = {"root": str(root), "layout": layout, "region": 32, "resize": 36}
    monkeypatch.chdir(tmp_path)

    def call(**settings: Any) -> Answer:
        code = 0
        try:
            run(OmegaConf.create({"data": data, "again": False, "format": "text", "output": None, **settings}))
        except SystemExit as end:
            code = int(end.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


def copy(root: Path, path: str, *others: str) -> None:
    for other in others:
        shutil.copy(root / path, root / other)


def index_of(root: Path) -> Index:
    return make_index(root, folder, whole=True, refresh=True, progress=False)


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Size and date of all that lies in `root`, folders too."""
    stats = {str(path.relative_to(root)): path.stat() for path in [root, *root.rglob("*")]}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_the_numbers_of_a_clean_data_set(root: Path) -> None:
    (root / "train" / "a" / "notes.txt").write_text("none")
    found = report(index_of(root), region=32, resize=36)
    assert found["root"] == str(root)
    assert found["pictures"] == 9 and found["bytes"] == sum((root / path).stat().st_size for path in SIZES)
    assert found["splits"] == {"train": 5, "val": 2, "test": 2}
    assert found["classes"] == {"a": {"train": 3, "val": 1, "test": 1}, "b": {"train": 2, "val": 1, "test": 1}}
    assert found["kinds"] == {"JPEG RGB": 4, "PNG RGB": 4, "PNG L": 1}
    assert found["exif_orientations"] == {"1": 8, "6": 1}
    # Of nine values the p-th percentile lies at position 8 p / 100: p1 is 8 % of the way from the first to the second.
    assert found["width"] == pytest.approx(
        {
            **{"smallest": 20, "p1": 20 + 0.08 * 11, "p5": 20 + 0.4 * 11, "median": 36},
            **{"p95": 60 + 0.6 * 30, "p99": 60 + 0.92 * 30, "largest": 90},
            **{"smallest_path": "train/a/2.jpg", "largest_path": "train/b/0.png"},
        }
    )
    height = found["height"]
    assert [height[name] for name in ("smallest", "median", "largest")] == [30, 40, 80]
    assert found["aspect_ratio"] == pytest.approx(
        {
            **{"smallest": 0.25, "p1": 0.25 + 0.08 * 0.525, "p5": 0.25 + 0.4 * 0.525, "median": 1},
            **{"p95": 1.5 + 0.6 * 1.5, "p99": 1.5 + 0.92 * 1.5, "largest": 3},
            **{"smallest_path": "train/a/2.jpg", "largest_path": "train/b/0.png"},
        }
    )
    assert (found["megapixels"]["largest"], found["megapixels"]["largest_path"]) == (0.0027, "train/b/0.png")
    assert found["below_region"] == ["train/a/2.jpg", "train/b/0.png", "val/b/0.png"]
    assert found["below_resize"] == ["train/a/2.jpg", "train/b/0.png", "train/b/1.png", "val/a/0.png", "val/b/0.png"]
    assert set(map(str, found["duplicates"].values())) == {"[]"}
    assert (found["bad"], found["passed_over"], found["notes"]) == ([], ["train/a/notes.txt"], [])


def test_a_clean_data_set_in_few_lines(spp: Spp, root: Path) -> None:
    answer = spp("check", root, "data.region=32", "data.resize=36")
    assert answer.code == 0, answer.err
    lines = {line[:14].strip(): line[14:] for line in answer.out.splitlines() if line}
    assert len(answer.out.splitlines()) < 40
    assert answer.out.splitlines()[0] == str(root)
    num_bytes = sum((root / path).stat().st_size for path in SIZES)
    assert lines["pictures"] == f"9 of 2 classes, {num_bytes / 1000:.3g} kB"
    assert lines["splits"] == "train 5, val 2, test 2"
    assert lines["classes"] == "2 (b) to 3 (a) training pictures a class"
    assert lines["kinds"] == "JPEG RGB 4, PNG RGB 4, PNG L 1"
    assert lines["EXIF"].startswith("1 (11.1%) are turned by it")
    assert lines["width px"].split() == ["20", "20.9", "24.4", "36", "78", "87.6", "90"]
    assert lines["width/height"].split() == ["0.25", "0.292", "0.46", "1", "2.4", "2.88", "3"]
    assert (lines["narrowest"], lines["widest"], lines["most pixels"]) == (
        "train/a/2.jpg",
        "train/b/0.png",
        "train/b/0.png",
    )
    first = "train/a/2.jpg, train/b/0.png"
    assert f"5 (55.6%) with a shorter side below data.resize=36 px: {first}, train/b/1.png, …\n" in answer.out
    assert f"3 (33.3%) with a shorter side below data.region=32 px: {first}, val/b/0.png\n" in answer.out
    assert (lines["duplicates"], lines["bad"]) == ("none", "none")


def test_duplicates(check: Check, root: Path) -> None:
    copy(root, "train/a/0.jpg", "train/a/9.jpg")
    copy(root, "train/a/1.png", "train/b/9.png")
    copy(root, "train/b/0.png", "val/b/9.png", "test/b/9.png")
    copy(root, "val/a/0.png", "test/b/8.png")
    found = report(index_of(root), 32, 36)["duplicates"]

    def names(key: str) -> list[list[str]]:
        return [[each["path"] for each in group] for group in found[key]]

    assert names("in_one_split") == [["train/a/0.jpg", "train/a/9.jpg"], ["train/a/1.png", "train/b/9.png"]]
    assert names("between_splits") == [
        ["test/b/8.png", "val/a/0.png"],
        ["test/b/9.png", "train/b/0.png", "val/b/9.png"],
    ]
    assert names("of_several_classes") == [["test/b/8.png", "val/a/0.png"], ["train/a/1.png", "train/b/9.png"]]
    assert found["between_splits"][0] == [
        {"path": "test/b/8.png", "split": "test", "class": "b"},
        {"path": "val/a/0.png", "split": "val", "class": "a"},
    ]
    assert (found["val_in_train"], found["test_in_train"]) == (["val/b/9.png"], ["test/b/9.png"])

    answer = check()
    assert answer.code == 0  # none of them is bad
    start = answer.out.index("\nduplicates")
    assert [line[14:] for line in answer.out[start:].splitlines()[1:]] == [
        "4 groups of files of the same bytes",
        "2 inside one split",
        "  train/a/0.jpg (train) = train/a/9.jpg (train)",
        "  train/a/1.png (train) = train/b/9.png (train)",
        "2 between splits",
        "  test/b/8.png (test) = val/a/0.png (val)",
        "  test/b/9.png (test) = train/b/0.png (train) = val/b/9.png (val)",
        "2 with different classes",
        "  test/b/8.png (b) = val/a/0.png (a)",
        "  train/a/1.png (a) = train/b/9.png (b)",
        "1 val pictures are in train, too: val/b/9.png",
        "1 test pictures are in train, too: test/b/9.png",
        "none",
    ]


def test_many_duplicates_are_shortened_in_the_text_alone(root: Path) -> None:
    copy(root, "train/a/0.jpg", *(f"train/a/copy{i}.jpg" for i in range(9)))
    for i, path in enumerate(("train/a/1.png", "train/b/0.png", "train/b/1.png")):
        copy(root, path, f"train/b/copy{i}.png")
    found = report(index_of(root), 32, 36)
    assert [len(group) for group in found["duplicates"]["in_one_split"]] == [10, 2, 2, 2]
    said = text(found)
    names = ["0.jpg", "copy0.jpg", "copy1.jpg", "copy2.jpg"]
    assert " = ".join(f"train/a/{name} (train)" for name in names) + " = … (6 more)\n" in said
    assert "train/b/copy1.png" in said and "train/b/copy2.png" not in said and "  …\n" in said


def test_only_whole_hashes_that_are_known_make_duplicates(root: Path) -> None:
    index = index_of(root)
    hashes = np.zeros((9, 32), np.uint8)  # not read whole: rows 0 to 4
    hashes[5:8, :8] = 7
    hashes[5:8, 31] = [1, 2, 1]
    hashes[8, 0] = 7
    found = report(replace(index, hashes=hashes), 32, 36)["duplicates"]
    assert [[each["path"] for each in group] for group in found["in_one_split"]] == []
    assert [[each["path"] for each in group] for group in found["between_splits"]] == [
        [index.paths[5], index.paths[7]],
    ]


def damage(root: Path) -> dict[str, str]:
    """Three bad files more, with a word of the reason."""
    whole = (root / "train" / "a" / "0.jpg").read_bytes()
    (root / "train" / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "test" / "a" / "text.jpg").write_text("no picture")
    (root / "val" / "b" / "empty.png").touch()
    return {
        "test/a/text.jpg": "not a picture of a known format",
        "train/a/cut.jpg": "truncated",
        "val/b/empty.png": "is empty (0 bytes)",
    }


def test_bad_files_are_all_named_with_their_reasons(check: Check, root: Path) -> None:
    reasons = damage(root)
    answer = check()
    assert answer.code == 1
    head, *lines = answer.out[answer.out.index("\nbad ") + 1 :].splitlines()
    assert head.split(maxsplit=1)[1] == "3 (25.0%) of the files"
    for line, (path, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"  {path}: ") and reason in line
    assert "9 of 2 classes" in answer.out

    found = json.loads(check(format="json").out)
    assert [f"  {each['path']}: {each['reason']}" for each in found["bad"]] == lines


def test_a_data_set_of_bad_files_alone(check: Check, root: Path) -> None:
    for path in SIZES:
        (root / path).write_text("no picture")
    answer = check()
    assert answer.code == 1
    assert "0 of 2 classes, 0 bytes" in answer.out and "9 (100.0%) of the files" in answer.out
    assert json.loads(check(format="json").out)["width"] is None


def test_the_second_time_nothing_is_read_and_only_what_changed(check: Check, root: Path) -> None:
    first = check()
    assert f"index of {root}: 9 pictures, read whole" in first.err
    assert check() == (0, first.out, "")
    Image.new("RGB", (41, 41)).save(root / "test" / "a" / "0.jpg")
    assert f"index of {root}: 1 pictures, read whole" in check().err


def test_again_finds_contents_that_changed_under_an_unchanged_date(check: Check, root: Path) -> None:
    file = root / "train" / "b" / "2.bmp"
    Image.new("RGB", (40, 40)).save(file)
    assert check().code == 0
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert check()[::2] == (0, "")
    answer = check(again=True)
    assert answer.code == 1 and "10 pictures, read whole" in answer.err
    assert f"  train/b/2.bmp: {facts.ROTTEN}\n" in answer.out
    assert "1 (10.0%) of the files" in answer.out


def test_interrupted_it_goes_on_where_it_was(check: Check, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_at, last = facts.look_at, str(root / max(SIZES))

    def interrupted(file: str, whole: bool) -> facts.Facts:
        if file == last:
            raise KeyboardInterrupt
        return look_at(file, whole)

    with monkeypatch.context() as patch:
        patch.setattr(facts, "CHUNK", 1)
        patch.setattr(facts, "look_at", interrupted)
        answer = check()
    assert (answer.code, answer.out) == (130, "")
    assert answer.err == "spp check: interrupted; the same command goes on where it was\n"
    answer = check()
    assert answer.code == 0 and "index of " in answer.err and ": 1 pictures, read whole" in answer.err


def test_json_agrees_with_the_text_and_a_file_with_the_terminal(check: Check, root: Path, tmp_path: Path) -> None:
    damage(root)
    copy(root, "train/a/0.jpg", "test/a/9.jpg")
    before = tree(root)
    said = {form: check(format=form) for form in ("text", "json")}
    assert said["text"].code == said["json"].code == 1
    assert json.loads(said["json"].out) == report(index_of(root), 32, 36)
    assert text(json.loads(said["json"].out)) == said["text"].out
    for form in said:
        answer = check(format=form, output=f"out/{form}")
        assert (answer.code, answer.out) == (1, "")
        assert (tmp_path / "out" / form).read_text(encoding="utf-8") == said[form].out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["json", "text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
    assert tree(root) == before


def test_names_that_are_no_text_are_shown(root: Path) -> None:
    index = replace(index_of(root), bad=(Bad("train/a/two\nlines\udcff.jpg", "cut"),), notes=("ä ×",))
    said = text(report(index, 32, 36))
    assert "  train/a/two\\nlines\\udcff.jpg: cut\n" in said and "ä ×\n" in said
    assert said.encode()
    found: Any = json.loads(json.dumps(report(index, 32, 36)))
    assert found["bad"] == [{"path": "train/a/two\nlines\udcff.jpg", "reason": "cut"}]


def test_the_data_set_is_named_as_in_training(spp: Spp, root: Path, tmp_path: Path) -> None:
    def parts(*words: str | Path) -> dict[str, int]:
        answer = spp("check", *words, "format=json")
        assert answer.code == 0, answer.err
        found: dict[str, int] = json.loads(answer.out)["splits"]
        return found

    lines = [f"{path},{path.split('/')[1]},{path.split('/')[0]}" for path in SIZES if path != "train/a/2.jpg"]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    assert parts("data=table", f"data.root={root}", "data.layout.table=labels.csv") == {"train": 4, "val": 2, "test": 2}
    shutil.copytree(root / "train", tmp_path / "it's a=b, $x")
    expected = make_index(root / "train", partial(folder, val_share=0.4, split_seed=3), progress=False).counts
    assert parts("data.layout.val_share=0.4", "it's a=b, $x", "data.layout.split_seed=3") == expected


def test_what_is_no_data_set_is_looked_at_all_the_same(spp: Spp, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "p" / "a" / "0.png")
    (tmp_path / "p" / "a" / "1.png").write_bytes(b"")
    answer = spp("check", tmp_path / "p")
    assert answer.code == 1
    assert f"no data set   {tmp_path / 'p' / 'b'}: no pictures in this class folder; fill or remove it" in answer.out
    assert "a/1.png: is empty (0 bytes)" in answer.out and "pictures      1, " in answer.out
    assert "splits" not in answer.out and "classes " not in answer.out  # which would be guesses
    assert spp("check", tmp_path / "nowhere").code == 2
    assert spp("check", "") == (2, "", "spp check: the folder's name is empty: name a folder\n")


def test_the_exit_code_reaches_the_shell(spp: Spp, root: Path) -> None:
    damage(root)
    answer = spp("check", root)
    assert answer.code == 1 and "  test/a/text.jpg: " in answer.out
    assert answer.err.startswith("index of ") and answer.err.count("\n") == 1


def test_an_option_keeps_the_word_behind_it(spp: Spp, root: Path) -> None:
    answer = spp("check", "--cfg", "job", root, "--package", "data", "again=true")
    assert answer.code == 0, answer.err
    assert f"root: {root}\n" in answer.out
    assert "usage: spp check PICTURES" in spp("check", "--help").out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "data.root has no value: give one"),
        (["nope"], "nope: does not exist; wanted is a folder of pictures"),
        (["pictures", "nope"], "pictures nope: one data set at a time; name one folder"),
        (["pictures", "data.root=nope"], "pictures data.root=nope: one data set at a time"),
        (["pictures", "agian=true"], "agian: there is no such key; did you mean again?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(spp: Spp, root: Path, tmp_path: Path, words: list[str], line: str) -> None:
    before = tree(tmp_path)
    answer = spp("check", *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith("spp check: ") and line in answer.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"format": "xml"}, "^format=xml: use text or json$"),
        ({"output": "pictures"}, "^output=pictures: is a folder; name a file$"),
        ({"output": "pictures/train/a/0.jpg/x"}, "^output=pictures/train/a/0.jpg/x: .*; name a file that can be writ"),
        ({"data": {"root": "pictures", "_target_": "mine.Data"}}, "^data.layout has no value: give one"),
        ({"data": {"root": "pictures", "layout": {"_target_": "no.such"}, "region": 1, "resize": 1}}, "^data.layout._"),
    ],
    ids=lambda value: "",
)
def test_settings_that_cannot_be(check: Check, root: Path, settings: dict[str, Any], line: str) -> None:
    before = tree(root)
    with pytest.raises(ValueError, match=line):
        check(**settings)
    assert tree(root) == before
