from __future__ import annotations

import os
import random
import re
import shutil
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spp_cls.data.index import make_index
from spp_cls.data.layouts import SUFFIXES, Listing, caltech101, folder, imagenet, shapes, table


def touch(root: Path, paths: Iterable[str]) -> Path:
    """Empty files: a layout looks at names only."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def classes_of(numbers: dict[str, int], inside: str = "") -> list[str]:
    return [f"{inside}{name}/{i:03}.jpg" for name, number in numbers.items() for i in range(number)]


def counted(listing: Listing) -> dict[str, Counter[str]]:
    """Split → class → pictures."""
    counts = {split: Counter[str]() for split in ("train", "val", "test")}
    for label, split in zip(listing.labels, listing.splits, strict=True):
        counts[split][listing.classes[label]] += 1
    return counts


def rows(listing: Listing) -> dict[str, tuple[str, str]]:
    """Path → (class, split), after checking what holds for every listing."""
    assert listing.paths == sorted(set(listing.paths)) and list(listing.classes) == sorted(set(listing.classes))
    assert set(listing.splits) == {"train", "val", "test"}
    pairs = zip(listing.labels, listing.splits, strict=True)
    found = {p: (listing.classes[n], split) for p, (n, split) in zip(listing.paths, pairs, strict=True)}
    assert {name for name, split in found.values() if split == "train"} == set(listing.classes)
    return found


def fails(message: str, call: Callable[..., Listing], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(*args, **kwargs)


# folder: root/<class>/…


def test_class_folders_are_drawn_class_by_class(tmp_path: Path) -> None:
    numbers = {"cat": 40, "dog": 25, "eel": 5, "fox": 3, "gnu": 2, "hen": 1}
    listing = folder(touch(tmp_path, classes_of(numbers)), val_share=0.1, test_share=0.2)
    assert all(path.split("/")[0] == name for path, (name, _) in rows(listing).items())
    assert counted(listing) == {
        "train": {"cat": 28, "dog": 17, "eel": 3, "fox": 1, "gnu": 1, "hen": 1},
        "val": {"cat": 4, "dog": 3, "eel": 1, "fox": 1},  # 2.5 → 3; 0.5 → 1; 0.3 → 1 as long as one is left
        "test": {"cat": 8, "dog": 5, "eel": 1, "fox": 1, "gnu": 1},
    }
    assert listing.notes == (
        "2 of 6 classes have no picture in val: gnu, hen",
        "1 of 6 classes have no picture in test: hen",
    )


def test_no_more_training_pictures_of_a_class_than_asked_for(tmp_path: Path) -> None:
    root = touch(tmp_path, classes_of({"cat": 40, "dog": 25, "eel": 5}))
    whole, few = folder(root), folder(root, train_per_class=10)
    assert counted(few) == {**counted(whole), "train": {"cat": 10, "dog": 10, "eel": 3}}
    assert rows(few).items() <= rows(whole).items()
    assert rows(folder(root, train_per_class=5)).items() <= rows(few).items()
    assert few.notes == ("10 training pictures of each class; 31 are left unused",)
    fails("train_per_class=0: must be 1 or more", folder, root, train_per_class=0)


def test_large_shares_leave_one_picture_for_train(tmp_path: Path) -> None:
    listing = folder(touch(tmp_path, classes_of({"a": 3, "b": 4})), val_share=0.45, test_share=0.5)
    assert counted(listing)["train"] == {"a": 1, "b": 1}


def without_sources(listing: Listing) -> Listing:
    return replace(listing, sources=())


def test_the_sources_are_the_folders_that_were_listed(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", [*classes_of({"a": 4, "b": 4}), "a/deep/er/x.jpg"])
    assert folder(root).sources == tuple(str(root / name) for name in (".", "a", "a/deep", "a/deep/er", "b"))


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = classes_of({"cat": 20, "dog": 20})
    first = folder(touch(tmp_path / "one", paths))
    assert without_sources(folder(touch(tmp_path / "two", random.Random(0).sample(paths, 40)))) == without_sources(
        first
    )
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    assert folder(tmp_path / "one") == first
    assert folder(tmp_path / "one", split_seed=1) != first
    # pinned: whoever trained with seed 0 must find the same test pictures in every later version
    assert [path for path, (_, split) in rows(first).items() if split == "test"] == [
        "cat/001.jpg",
        "cat/009.jpg",
        "dog/000.jpg",
        "dog/011.jpg",
    ]


def test_pictures_at_any_depth_and_of_any_suffix(tmp_path: Path) -> None:
    paths = [f"a/deep/er/{i}{suffix}" for i, suffix in enumerate(SUFFIXES)]
    paths += [f"b/{i}{suffix.upper()}" for i, suffix in enumerate(SUFFIXES)]
    listing = folder(touch(tmp_path, paths))
    assert listing.paths == sorted(paths) and listing.classes == ("a", "b") and listing.passed_over == ()


def test_what_is_no_picture_is_passed_over_and_named(tmp_path: Path) -> None:
    junk = [
        *("README.md", "a/Thumbs.db", "a/._0.jpg", "b/notes.txt", "b/jpg", "b/x.jpg.part", ".DS_Store"),
        *(".git/0.jpg", "__MACOSX/a/0.jpg", "a/@eaDir/0.jpg"),
    ]
    listing = folder(touch(tmp_path, [*junk, *classes_of({"a": 3, "b": 3})]))
    assert listing.passed_over == (
        *(".DS_Store", ".git", "README.md", "__MACOSX", "a/._0.jpg", "a/@eaDir", "a/Thumbs.db", "b/jpg"),
        *("b/notes.txt", "b/x.jpg.part"),
    )
    assert listing.paths == classes_of({"a": 3, "b": 3})


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", classes_of({"a": 3}))
    touch(tmp_path / "far", classes_of({"x": 3}))
    (root / "b").symlink_to(tmp_path / "far")
    assert folder(root).paths == [*classes_of({"a": 3}), *classes_of({"x": 3}, "b/")]
    (root / "a/up").symlink_to(root)
    fails(f"{root}/a/up: links to a folder that holds it: remove the link", folder, root)


def test_errors_of_a_folder(tmp_path: Path) -> None:
    fails(f"{tmp_path}/no: does not exist; wanted is a folder of pictures", folder, tmp_path / "no")
    touch(tmp_path, ["file.jpg"])
    fails(f"{tmp_path}/file.jpg: is a file; wanted is a folder of pictures", folder, tmp_path / "file.jpg")

    bare = touch(tmp_path / "bare", ["a/x.txt"])
    fails(f"{bare}: no pictures in it; wanted are {' '.join(SUFFIXES)}", folder, bare)
    single = touch(tmp_path / "single", classes_of({"cat": 5}))
    fails(f"{single}: only one class, 'cat'; wanted are two or more", folder, single)
    empty = touch(tmp_path / "empty", [*classes_of({"cat": 5, "dog": 5}), "eel/x.txt", "fox/deep/x.txt"])
    message = f"{empty}/eel: no pictures in this class folder (1 more); fill or remove it"
    fails(message, folder, empty)
    loose = touch(tmp_path / "loose", [*classes_of({"cat": 5, "dog": 5}), "x.jpg"])
    fails(f"{loose}/x.jpg: is in no class folder; move it to {loose}/<class>/", folder, loose)
    flat = touch(tmp_path / "flat", ["x.jpg", "y.jpg"])
    fails(f"{flat}/x.jpg: is in no class folder (1 more); move it to {flat}/<class>/", folder, flat)
    tiny = touch(tmp_path / "tiny", classes_of({"cat": 2, "dog": 2}))
    fails(f"{tiny}: no picture is left for val; wanted are 3 or more of some class", folder, tiny)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"val_share": 0}, "val_share=0: must be above 0 and below 1"),
        ({"test_share": 1.0}, "test_share=1.0: must be above 0 and below 1"),
        ({"val_share": 0.5, "test_share": 0.5}, "val_share=0.5, test_share=0.5: must be below 1 together"),
    ],
)
def test_errors_of_shares(tmp_path: Path, shares: dict[str, float], message: str) -> None:
    fails(message, folder, tmp_path, **shares)


# folder: root/{train,val,test}/<class>/…


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_three_parts_are_taken_as_they_are(tmp_path: Path, val: str) -> None:
    paths = [p for top, n in (("train", 4), (val, 2), ("test", 1)) for p in classes_of({"a": n, "b": n}, f"{top}/")]
    listing = folder(touch(tmp_path, [*paths, "train/readme.txt", "docs/x.txt"]))
    assert counted(listing) == {"train": {"a": 4, "b": 4}, "val": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}}
    assert all(path.split("/")[1] == name for path, (name, _) in rows(listing).items())
    assert listing.passed_over == ("docs/x.txt", "train/readme.txt") and listing.notes == ()


def test_train_and_test_val_is_drawn_from_train(tmp_path: Path) -> None:
    paths = classes_of({"a": 20, "b": 30}, "train/") + classes_of({"a": 5, "b": 5}, "test/")
    listing = folder(touch(tmp_path, paths), val_share=0.2)
    assert counted(listing) == {"train": {"a": 16, "b": 24}, "val": {"a": 4, "b": 6}, "test": {"a": 5, "b": 5}}
    assert all(path.startswith("test/") == (split == "test") for path, (_, split) in rows(listing).items())
    assert listing.notes == ("val drawn from train by seed",)


def test_train_and_val_val_serves_as_test(tmp_path: Path) -> None:
    paths = classes_of({"a": 20, "b": 30}, "train/") + classes_of({"a": 5, "b": 5}, "val/")
    listing = folder(touch(tmp_path, paths))
    assert counted(listing) == {"train": {"a": 18, "b": 27}, "val": {"a": 2, "b": 3}, "test": {"a": 5, "b": 5}}
    assert all(path.startswith("val/") == (split == "test") for path, (_, split) in rows(listing).items())
    assert listing.notes == ("there is no test part: val serves as test, and val is drawn from train by seed",)


def test_train_alone(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    listing = folder(touch(tmp_path, classes_of({"a": 10, "b": 20}, "train/")))
    assert counted(listing) == {"train": {"a": 8, "b": 16}, "val": {"a": 1, "b": 2}, "test": {"a": 1, "b": 2}}
    assert listing.notes == ("test and val drawn from train by seed",)


def test_classes_must_agree(tmp_path: Path) -> None:
    paths = [p for top in ("train", "val", "test") for p in classes_of({"a": 2, "b": 2}, f"{top}/")]
    less = touch(tmp_path / "less", [path for path in paths if not path.startswith("test/b")])
    (less / "test/b").mkdir()
    assert folder(less).notes == ("1 of 2 classes have no picture in test: b",)
    more = touch(tmp_path / "more", [*paths, "test/c/0.jpg"])
    fails(f"{more}/test/c/0.jpg: its class 'c' is in test, but not in train", folder, more)


def test_errors_of_parts(tmp_path: Path) -> None:
    two = classes_of({"a": 3, "b": 3}, "train/")
    root = touch(tmp_path / "1", [*classes_of({"a": 3, "b": 3}, "val/"), *classes_of({"a": 3, "b": 3}, "test/")])
    fails(f"{root}: has test, val, but no folder train", folder, root)
    root = touch(tmp_path / "2", [*two, "val/a/0.jpg", "valid/a/0.jpg"])
    message = f"{root}: has train, val, valid; wanted is one folder for each of train, val, test"
    fails(message, folder, root)
    root = touch(tmp_path / "3", [*two, "val/a/0.jpg", "extra/a/0.jpg"])
    fails(f"{root}/extra: has pictures beside the folders train, val: move it away", folder, root)
    root = touch(tmp_path / "4", [*two, "val/a/0.jpg", "0.jpg"])
    fails(f"{root}/0.jpg: has pictures beside the folders train, val: move it away", folder, root)
    root = touch(tmp_path / "5", [*two, "test/0.jpg", "test/1.jpg"])
    fails(f"{root}/test/0.jpg: is in no class folder (1 more); move it to {root}/test/<class>/", folder, root)
    root = touch(tmp_path / "6", [*two, "train/c/x.txt", "test/a/0.jpg"])
    fails(f"{root}/train/c: no pictures in this class folder; fill or remove it", folder, root)
    root = touch(tmp_path / "7", ["train/a/0.jpg", "test/a/0.jpg"])
    fails(f"{root}/train: only one class, 'a'; wanted are two or more", folder, root)


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    listing = folder(touch(tmp_path, classes_of({"bus": 5, "train": 5})))
    assert listing.classes == ("bus", "train")
    assert listing.notes == ("the folder 'train' is taken for a class",)


# table


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return tmp_path / "t.csv"


def test_a_table_with_splits(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", ["0.jpg", "x/1.jpg", "x/2.jpg", "x/3.jpg", "unlisted.jpg"])
    text = "\ufefflabel, path ,split\nb,0.jpg,train\n\na, x/1.jpg,Train\nb,./x/2.jpg,valid\na,x/../x/3.jpg,test\n"
    listing = table(root, table=write(tmp_path, text))
    assert rows(listing) == {
        "0.jpg": ("b", "train"),
        "x/1.jpg": ("a", "train"),
        "x/2.jpg": ("b", "val"),
        "x/3.jpg": ("a", "test"),
    }
    assert listing.labels == [1, 0, 1, 0] and listing.passed_over == ()


def test_a_table_without_splits_is_drawn_as_a_folder_is(tmp_path: Path) -> None:
    paths = classes_of({"a": 30, "b": 20})
    root = touch(tmp_path / "root", paths)
    shuffled = random.Random(0).sample(paths, 50)
    file = write(tmp_path, "path,label\n" + "".join(f"{path},{path[0]}\n" for path in shuffled))
    by_table = table(root, table=file, val_share=0.2, split_seed=3)
    assert without_sources(by_table) == without_sources(folder(root, val_share=0.2, split_seed=3))
    assert by_table.sources == (str(file),)


@pytest.mark.parametrize(
    ("words", "counts", "note"),
    [
        (["train", "test"], {"train": 18, "val": 2, "test": 5}, "val drawn from train by seed"),
        (["train", "val"], {"train": 18, "val": 2, "test": 5}, "val serves as test"),
        (["train", "train"], {"train": 19, "val": 3, "test": 3}, "test and val drawn from train by seed"),
    ],
)
def test_a_table_that_lacks_a_part(tmp_path: Path, words: list[str], counts: dict[str, int], note: str) -> None:
    numbers = {"a": 25, "b": 25}
    root = touch(tmp_path / "root", classes_of(numbers))
    lines = [f"{path},{path[0]},{words[int(path[2:5]) >= 20]}\n" for path in classes_of(numbers)]
    listing = table(root, table=write(tmp_path, "path,label,split\n" + "".join(lines)))
    assert counted(listing) == {split: {"a": number, "b": number} for split, number in counts.items()}
    assert len(listing.notes) == 1 and note in listing.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column path; it has none"),
        ("path,class\n", "line 1: no column label; it has path, class"),
        ("path,label\n0.jpg,a\nno.jpg,b\n", "line 3: {root}/no.jpg is not there"),
        ("path,label\n0.jpg,a\n1.jpg, \n", "line 3: the label is empty"),
        ("path,label\n,a\n", "line 2: the path is empty"),
        ("path,label,split\n0.jpg,a,dev\n", "line 2: the split is 'dev'; wanted is train, val or test"),
        ("path,label,split\n0.jpg,a,\n", "line 2: the split is ''; wanted is train, val or test"),
        ("path,label\n0.jpg,a\n1.jpg,b\n\n./0.jpg,b\n", "line 5: 0.jpg stands already in line 2"),
        ("path,label\n0.jpg,a,b\n", "line 2: 3 fields, but the header has 2"),
        ("path,label\n0.jpg\n", "line 2: 1 fields, but the header has 2"),
        ("path,label\n/0.jpg,a\n", "line 2: /0.jpg is absolute; wanted is a path relative to {root}"),
        ("path,label,group\n0.jpg,a,\n", "line 2: the group is empty; wanted is a name, even for one picture"),
        (
            "path,label,split,group\n0.jpg,a,train,g\n1.jpg,b,test,g\n",
            "line 3: the group 'g' is in test here, in train in line 2",
        ),
    ],
)
def test_errors_of_a_table_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    root = touch(tmp_path / "root", ["0.jpg", "1.jpg"])
    file = write(tmp_path, text)
    fails(f"{file}, {message.format(root=root)}", table, root, table=file)


def test_errors_of_a_whole_table(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", ["0.jpg", "1.jpg"])
    fails(f"{root}/no: does not exist; wanted is a folder of pictures", table, root / "no", table="t.csv")
    message = f"{tmp_path}/no.csv: does not exist; wanted is a CSV file with the columns path, label"
    fails(message, table, root, table=tmp_path / "no.csv")
    file = write(tmp_path, "path,label\n")
    fails(f"{file}: names no pictures", table, root, table=file)
    write(tmp_path, "path,label\n0.jpg,a\n1.jpg,a\n")
    fails(f"{file}: only one label, 'a'; wanted are two or more", table, root, table=file)
    write(tmp_path, "path,label,split\n0.jpg,a,val\n1.jpg,b,test\n")
    fails(f"{file}: no line has the split train", table, root, table=file)
    file.write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(ValueError, match=re.escape(f"{file}: is not UTF-8")):
        table(root, table=file)
    write(tmp_path, 'path,label\n"' + "x" * 200_000 + '",a\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: field larger than field limit")):
        table(root, table=file)


@pytest.mark.parametrize("seed", range(20))
def test_no_group_straddles(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    groups = [f"g{i}" for i in range(60)]
    home = {group: chance.choice("abc") for group in groups}
    numbers = {group: chance.randint(1, 8) for group in groups}
    lines, group_of, labels = [], {}, Counter[str]()
    for group in groups:
        for i in range(numbers[group]):
            label = home[group] if chance.random() < 0.8 else chance.choice("abc")
            lines.append(f"{group}_{i}.jpg,{label},{group}\n")
            group_of[f"{group}_{i}.jpg"] = group
            labels[label] += 1
    root = touch(tmp_path / "root", group_of)
    file = write(tmp_path, "path,label,group\n" + "".join(lines))
    listing = table(root, table=file, val_share=0.2, test_share=0.2, split_seed=seed)
    split_of: dict[str, set[str]] = {}
    for path, (_, split) in rows(listing).items():
        split_of.setdefault(group_of[path], set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    counts = counted(listing)
    for split in ("val", "test"):
        for name, total in labels.items():
            assert abs(counts[split][name] - 0.2 * total) <= 4  # half the largest group

    write(tmp_path, "path,label,group\n" + "".join(chance.sample(lines, len(lines))))
    assert table(root, table=file, val_share=0.2, test_share=0.2, split_seed=seed) == listing


def test_groups_of_one_are_drawn_exactly(tmp_path: Path) -> None:
    paths = classes_of({"a": 30, "b": 21, "c": 3})
    root = touch(tmp_path / "root", paths)
    file = write(tmp_path, "path,label,group\n" + "".join(f"{path},{path[0]},{path}\n" for path in paths))
    assert counted(table(root, table=file)) == counted(folder(root))


def test_few_large_groups(tmp_path: Path) -> None:
    # each class: three groups of ten, and a tenth wanted: three pictures. One group is nearest and still far.
    paths = classes_of({"a": 30, "b": 30})
    root = touch(tmp_path / "root", paths)
    lines = [f"{path},{path[0]},{path[0]}{int(path[2:5]) // 10}\n" for path in paths]
    file = write(tmp_path, "path,label,group\n" + "".join(lines))
    listing = table(root, table=file)
    assert counted(listing) == {split: {"a": 10, "b": 10} for split in ("train", "val", "test")}


def test_the_last_group_of_a_class_stays_in_train(tmp_path: Path) -> None:
    paths = classes_of({"a": 30, "b": 30})
    root = touch(tmp_path / "root", paths)
    lines = [f"{path},{path[0]},{'b' if path[0] == 'b' else path}\n" for path in paths]
    file = write(tmp_path, "path,label,group\n" + "".join(lines))
    listing = table(root, table=file)
    assert counted(listing) == {"train": {"a": 24, "b": 30}, "val": {"a": 3}, "test": {"a": 3}}
    lines = [f"{path},{path[0]},{path[0]}\n" for path in paths]
    write(tmp_path, "path,label,group\n" + "".join(lines))
    fails(f"{root}: no picture is left for val; wanted are 3 or more of some class", table, root, table=file)


# caltech101


def test_caltech101_draws_train_then_test_then_val(tmp_path: Path) -> None:
    numbers = {"BACKGROUND_Google": 12, "anchor": 9, "cup": 5, "skate": 4}
    inside = "101_ObjectCategories/"
    root = touch(tmp_path, [*classes_of(numbers, inside), f"{inside}BACKGROUND_Google/tmp"])
    listing = caltech101(root, train_per_class=3, test_per_class=4, val_per_class=3)
    assert counted(listing) == {
        "train": {"BACKGROUND_Google": 3, "anchor": 3, "cup": 3, "skate": 3},
        "test": {"BACKGROUND_Google": 4, "anchor": 4, "cup": 2, "skate": 1},
        "val": {"BACKGROUND_Google": 3, "anchor": 2},
    }
    assert all(path.split("/")[1] == name for path, (name, _) in rows(listing).items())
    assert listing.passed_over == (f"{inside}BACKGROUND_Google/tmp",)
    assert listing.notes == (
        "2 of the 30 pictures are left unused",
        "4 categories; Caltech101 has 102 with BACKGROUND_Google",
        "2 of 4 classes have no picture in val: cup, skate",
    )
    below = caltech101(root / inside, train_per_class=3, test_per_class=4, val_per_class=3)
    assert [inside + path for path in below.paths] == listing.paths and below.splits == listing.splits
    other = caltech101(root, train_per_class=3, test_per_class=4, val_per_class=3, split_seed=1)
    assert other.paths != listing.paths and counted(other) == counted(listing)


def test_caltech101_as_in_the_paper(tmp_path: Path) -> None:
    numbers = {f"c{i:03}": 31 + i for i in range(102)}
    counts = counted(caltech101(touch(tmp_path, classes_of(numbers))))
    assert set(counts["train"].values()) == {30} and len(counts["train"]) == 102
    assert counts["test"] == {name: min(50, number - 30) for name, number in numbers.items()}
    assert counts["val"] == {name: min(10, number - 80) for name, number in numbers.items() if number > 80}


def test_caltech101_with_all_that_test_and_val_leave(tmp_path: Path) -> None:
    numbers = {f"c{i:03}": 31 + i for i in range(0, 102, 20)}
    root = touch(tmp_path, classes_of(numbers))
    few, every = caltech101(root), caltech101(root, train_per_class=None)
    assert rows(few).items() < rows(every).items()
    assert counted(every) == {**counted(few), "train": {name: max(30, n - 60) for name, n in numbers.items()}}


def test_caltech101_with_val_out_of_train(tmp_path: Path) -> None:
    root = touch(tmp_path, classes_of({"a": 31, "b": 90}))
    usual, chosen = rows(caltech101(root)), rows(caltech101(root, val_of_train=5))
    assert counted(caltech101(root, val_of_train=5)) == {
        "train": {"a": 25, "b": 25},
        "val": {"a": 5, "b": 5},
        "test": {"a": 1, "b": 50},
    }
    for path, (name, split) in chosen.items():
        assert usual[path] == (name, "train" if split == "val" else split)
    fails("val_of_train=30: must be 0 or more, and below train_per_class=30", caltech101, root, val_of_train=30)


def test_errors_of_caltech101(tmp_path: Path) -> None:
    root = touch(tmp_path, classes_of({"a": 31, "b": 30}))
    message = f"{root}/b: has 30 pictures, but train_per_class=30 needs 31 or more"
    fails(message, caltech101, root)
    fails("val_per_class=0: must be 1 or more", caltech101, root, val_per_class=0)
    fails(f"{root}/no: does not exist; wanted is a folder of pictures", caltech101, root / "no")


# imagenet


def test_imagenet_in_folders(tmp_path: Path) -> None:
    train = [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in ("n01", "n02") for i in range(8)]
    val = [f"val/{wnid}/ILSVRC2012_val_{i:08}.JPEG" for wnid in ("n01", "n02") for i in range(3)]
    listing = imagenet(touch(tmp_path, [*train, *val, "test/x.JPEG", "train/x.txt"]), val_per_class=2)
    assert counted(listing) == {
        "train": {"n01": 6, "n02": 6},
        "val": {"n01": 2, "n02": 2},
        "test": {"n01": 3, "n02": 3},
    }
    assert sorted(path for path, (_, split) in rows(listing).items() if split == "test") == sorted(val)
    assert all(path.split("/")[1] == name for path, (name, _) in rows(listing).items())
    assert listing.notes == ("ImageNet's val is the test split; val is drawn from train by seed",)
    assert listing.passed_over == ("train/x.txt",)
    assert imagenet(tmp_path, val_per_class=2, split_seed=1).splits != listing.splits


def test_imagenet_with_a_flat_val(tmp_path: Path) -> None:
    train = [f"train/{wnid}/{i}.JPEG" for wnid in ("n01", "n02") for i in range(12)]
    root = touch(tmp_path, [*train, "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG"])
    fails(
        f"{root}/val: is flat, and {root}/LOC_val_solution.csv is not there; "
        "sort the pictures into val/<wnid>/ or lay Kaggle's LOC_val_solution.csv there",
        imagenet,
        root,
    )
    solution = root / "LOC_val_solution.csv"
    lines = ["ImageId,PredictionString", "ILSVRC2012_val_00000001,n02 85 1 499 272 n02 1 1 9 9 "]
    solution.write_text("\n".join(lines))
    message = f"{root}/val/ILSVRC2012_val_00000002.JPEG: {solution} does not name this picture"
    fails(message, imagenet, root)
    solution.write_text("\n".join([*lines, "ILSVRC2012_val_00000002, "]))
    fails(f"{solution}, line 3: the PredictionString is empty; it begins with the wnid", imagenet, root)
    solution.write_text("\n".join([*lines, "ILSVRC2012_val_00000002,n01 1 2 3 4"]))
    test = {path: name for path, (name, split) in rows(imagenet(root)).items() if split == "test"}
    assert test == {"val/ILSVRC2012_val_00000001.JPEG": "n02", "val/ILSVRC2012_val_00000002.JPEG": "n01"}


def test_imagenet_with_names(tmp_path: Path) -> None:
    wnids = ("n01440764", "n02012849", "n03126707")
    paths = [f"{top}/{wnid}/{i}.JPEG" for top in ("train", "val") for wnid in wnids for i in range(3)]
    root = touch(tmp_path, paths)
    bare = imagenet(root, val_per_class=1)
    assert bare.classes == wnids
    mapping = root / "LOC_synset_mapping.txt"
    lines = [
        "n02012849 crane",
        "n01440764 tench, Tinca tinca",
        "",
        "n09999999 of no picture",
        "n03126707  crane , lift",
    ]
    mapping.write_text("\n".join(lines), encoding="utf-8-sig")
    named = imagenet(root, val_per_class=1)
    assert named == replace(bare, classes=("n01440764 tench", "n02012849 crane", "n03126707 crane"))
    assert str(mapping) in bare.sources  # so that an index is made anew where it comes or changes
    mapping.write_text("n02012849 crane\n")
    assert imagenet(root, val_per_class=1).classes == ("n01440764", "n02012849 crane", "n03126707")
    mapping.write_text("n02012849 crane\nn01440764\n")
    fails(f"{mapping}, line 2: 'n01440764'; wanted is a wnid and its names", imagenet, root, val_per_class=1)
    mapping.write_bytes(b"n02012849 \xff\n")
    with pytest.raises(ValueError, match=re.escape(f"{mapping}: is not UTF-8")):
        imagenet(root, val_per_class=1)


def test_names_that_come_later_are_seen_by_the_index(tmp_path: Path, pictures: Path) -> None:
    root = tmp_path / "imagenet"
    for top in ("train", "val"):
        shutil.copytree(pictures / "train", root / top)
    layout = partial(imagenet, val_per_class=1)
    for path in (root, *root.rglob("*")):
        os.utime(path, (0, 0))  # as if all had lain there for long
    before = make_index(root, layout, progress=False)
    assert before.classes == ("a", "b", "c")
    (root / "LOC_synset_mapping.txt").write_text("a apple\n")
    os.utime(root, (0, 0))  # train and val are what is listed
    after = make_index(root, layout, progress=False)
    assert after.classes == ("a apple", "b", "c")
    assert after.labels.tolist() == before.labels.tolist()


def test_errors_of_imagenet(tmp_path: Path) -> None:
    root = touch(tmp_path, [f"train/{wnid}/{i}.JPEG" for wnid in ("n01", "n02") for i in range(10)])
    fails(f"{root}/val: does not exist; wanted is a folder of pictures", imagenet, root)
    touch(root, ["val/n03/0.JPEG"])
    fails(f"{root}/train/n01: has 10 pictures, but val_per_class=10 needs 11 or more", imagenet, root)
    fails(f"{root}/val/n03/0.JPEG: its class 'n03' is in test, but not in train", imagenet, root, val_per_class=1)
    fails("val_per_class=0: must be 1 or more", imagenet, root, val_per_class=0)


# shapes


def test_shapes_draws_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_shapes(root: Path, *, seed: int) -> None:
        assert seed == 7
        touch(root, [p for top in ("train", "val", "test") for p in classes_of({"a": 2, "b": 2}, f"{top}/")])

    monkeypatch.setitem(sys.modules, "spp_cls.data.shapes", types.SimpleNamespace(make_shapes=make_shapes))
    assert len(rows(shapes(tmp_path / "shapes", seed=7))) == 12
