"""`spp predict`: what evaluate says of the same picture, in three formats, whatever files are called."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Spp

from spp_cls.predict import pictures as pictures_of


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("views", ["ten_crop", "ten_crop_maps", "multi_scale_full"])
def test_probabilities_are_those_of_evaluate(spp: Spp, run: Path, pictures: Path, views: str) -> None:
    assert spp("evaluate", f"run={run}", f"views={views}").code == 0
    file = np.load(run / "evaluations" / f"test_{views}_32" / "scores.npz")
    paths = [pictures / str(path) for path in file["paths"]]
    answer = spp("predict", f"run={run}", f"views={views}", "format=jsonl", "device=cpu", *paths)
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, scores in zip(rows, file["scores"], strict=True):
        assert row["class"] == file["classes"][scores.argmax()]
        assert row["probability"] == pytest.approx(scores.max(), abs=1e-5)
        assert list(row["top"]) == [str(file["classes"][k]) for k in np.argsort(-scores)]
        assert [row["top"][name] for name in file["classes"]] == pytest.approx(scores.tolist(), abs=1e-5)


def test_the_formats_say_the_same(spp: Spp, run: Path, pictures: Path, tmp_path: Path) -> None:
    words = [f"run={run}", "top=2", pictures / "test" / "a"]
    rows = [json.loads(line) for line in spp("predict", *words, "format=jsonl").out.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["00.jpg", "01.jpg", "02.jpg"]
    assert all(len(row["top"]) == 2 for row in rows)

    found = list(csv.DictReader(io.StringIO(spp("predict", *words, "format=csv").out)))
    assert [(row["path"], row["class"]) for row in found] == [(row["path"], row["class"]) for row in rows]
    assert [json.loads(row["top"]) for row in found] == [row["top"] for row in rows]
    assert [float(row["probability"]) for row in found] == pytest.approx([row["probability"] for row in rows], abs=1e-6)

    lines = spp("predict", *words).out.splitlines()
    for line, row in zip(lines, rows, strict=True):
        (first, p), (other, q) = row["top"].items()
        assert line == f"{row['path']}  {first} {p:.1%}   ({other} {q:.1%})"

    assert spp("predict", *words, "format=jsonl", "output=answers.jsonl").out == ""
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == rows


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_answered(
    spp: Spp, run: Path, pictures: Path, tmp_path: Path
) -> None:
    good = [pictures / "test" / "a" / f"0{i}.jpg" for i in range(2)]
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    answer = spp("predict", f"run={run}", "format=jsonl", good[0], bad, good[1])
    assert answer.code == 2
    assert [json.loads(line)["path"] for line in answer.out.splitlines()] == [str(path) for path in good]
    first, last = answer.err.splitlines()
    assert first.startswith(f"spp predict: {bad}: ")
    assert last == "spp predict: 1 of 3 pictures could not be read; they are named above"


def test_names_with_odd_letters(spp: Spp, run: Path, pictures: Path, tmp_path: Path) -> None:
    odd = ["a b", "it's", "a=b", 'say "x"', "a,b", "[1]", "back\\slash", "back\\'", "ä ö", "$x ${y}", "+c", "~d", "a#b"]
    paths = [f"{name}.jpg" for name in odd]
    for path in paths:
        shutil.copy(pictures / "test" / "a" / "00.jpg", tmp_path / path)
    answer = spp("predict", f"run={run}", "format=jsonl", *paths)
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["path"] for row in rows] == paths
    assert len({row["probability"] for row in rows}) == 1


def test_a_name_that_is_no_text_or_has_line_breaks_is_one_line_and_comes_back_from_a_file(
    spp: Spp, run: Path, pictures: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    names = ["a\udcff.jpg", "b\nc.jpg"]
    for name in names:
        shutil.copy(pictures / "test" / "a" / "00.jpg", odd / name)
    lines = spp("predict", f"run={run}", "odd").out.splitlines()
    assert [line.partition(".jpg ")[0] for line in lines] == ["odd/a\\udcff", "odd/b\\nc"]
    assert spp("predict", f"run={run}", "odd", "format=csv", "output=o.csv").code == 0
    with (tmp_path / "o.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [f"odd/{name}" for name in names]


def test_the_training_pictures_need_not_be_there(spp: Spp, tmp_path: Path, small: list[str], pictures: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    words = [word for word in small if "data.root" not in word]
    assert spp("train", *words, f"data.root={root}", "trainer.max_epochs=1", "test=false").code == 0
    (run,) = (tmp_path / "runs" / "folder-tiny").iterdir()
    picture = tmp_path / "one.jpg"
    shutil.move(root / "test" / "b" / "00.jpg", picture)
    shutil.rmtree(root)
    (run / "checkpoints" / "best.ckpt").rename(tmp_path / "elsewhere")
    answer = spp("predict", f"run={run / 'checkpoints' / 'last.ckpt'}", picture)
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"{picture}  ")
    assert not root.exists()


def test_a_broken_link_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "b.txt").symlink_to("nowhere.jpg")
    assert pictures_of([str(tmp_path)]) == [tmp_path / "a.jpg"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no pictures named; give paths of pictures or folders"),
        (["nope.jpg"], "nope.jpg does not exist; name pictures or folders of pictures"),
        (["empty"], "empty: no pictures in this folder"),
        (["format=xml", "one.jpg"], "format=xml: use table, csv or jsonl"),
        (["device=tpu9", "one.jpg"], "device=tpu9: "),
        (["ckpt=frist", "one.jpg"], "frist.ckpt does not exist"),
        (["top=0", "one.jpg"], "top=0: use a whole number of at least 1"),
        (["output=empty", "one.jpg"], "output=empty: is a folder; name a file"),
        (["views.size=2", "one.jpg"], "views.size: the net does not take images of 2 px"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(
    spp: Spp, run: Path, pictures: Path, tmp_path: Path, words: list[str], line: str
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copy(pictures / "test" / "a" / "00.jpg", tmp_path / "one.jpg")
    answer = spp("predict", f"run={run}", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.count("\n") == 1 and line in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "one.jpg", "run"]


def test_what_a_mac_leaves_behind_is_no_picture(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", "__MACOSX/b.jpg", ".hidden/c.jpg", "@eaDir/d.jpg"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    assert pictures_of([str(tmp_path / "p")]) == [tmp_path / "p" / "a.jpg"]


def test_folders_are_searched_below_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.jpeg", "b/c/3.webp", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = pictures_of([str(tmp_path / "b"), str(tmp_path / "a.jpeg"), str(tmp_path / "b" / "notes.txt")])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "b/1.png",
        "b/2.JPG",
        "b/c/3.webp",
        "a.jpeg",
        "b/notes.txt",
    ]


def test_an_option_keeps_the_word_behind_it(spp: Spp, trained: Path, pictures: Path) -> None:
    answer = spp("predict", f"run={trained}", "--cfg", "job", pictures / "test" / "a" / "00.jpg")
    assert answer.code == 0, answer.err
    assert "paths:\n- " in answer.out and "00.jpg" in answer.out
