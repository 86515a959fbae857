"""Layouts: how a data set lies on disk. Each function lists its pictures with their classes and splits."""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# In any case. A reader is not promised by a name: HEIC, for one, asks for a package of its own.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".avif", ".ppm", ".pgm", ".heic", ".heif"),
)
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
THUMBNAILS = ("__MACOSX", "@eaDir")  # folders that file managers fill behind the user's back
TRAIN_PER_CATEGORY = 30  # He et al. 2014, §3.3
VAL_IS_TEST = "there is no test part: val serves as test, and val is drawn from train by seed"

Row = tuple[str, str, str]  # path, class, split; the split is "" until it is drawn


@dataclass(frozen=True)
class Listing:
    """The pictures of a data set, sorted by path.

    `paths` are relative to the root, with "/"; `labels` count in `classes`; `splits` are "train", "val" or
    "test". `passed_over` are the files that are no pictures by their names; `notes` are for the user to read.
    `sources` are the folders and files that it was read from: while none of their dates changes, it stays true.
    """

    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]
    splits: list[str]
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def folder(
    root: Path | str,
    *,
    val_share: float = 0.1,
    test_share: float = 0.1,
    train_per_class: int | None = None,
    split_seed: int = 0,
) -> Listing:
    """Lists `root/<class>/…` or `root/{train,val,test}/<class>/…`, pictures at any depth below a class.

    A part that is missing is drawn by seed, class by class: at least one picture for each part as long as
    one stays in train. Train and val without test: val serves as test, and val is drawn from train. Of the
    training pictures `train_per_class` of each class are used, chosen by seed; None: all.
    """
    root = Path(root)
    shares = _shares(val_share, test_share)
    found = _scan(root)
    tops = {path.split("/")[0] for path in found.pictures if "/" in path}
    parts = {top: SPLIT_WORDS[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_WORDS}
    loose = [path for path in found.pictures if "/" not in path]
    deep = all(path.count("/") > 1 for path in found.pictures)
    if not loose and len(parts) == len(tops) and (len(parts) > 1 or (parts and deep)):
        rows = _rows_of_parts(root, found, parts)
        notes = []
    elif "train" in parts.values() and len(parts) > 1:
        other = min(loose or tops - set(parts))
        raise ValueError(f"{root / other}: has pictures beside the folders {', '.join(parts)}: move it away")
    else:
        _check_classes(root, found)
        rows = [(path, path.split("/", 1)[0], "") for path in found.pictures]
        notes = [f"the folder '{top}' is taken for a class" for top in parts]
    rows, more = _complete(rows, {}, shares, split_seed)
    if train_per_class is not None:
        _check_positive({"train_per_class": train_per_class})
        rows, fewer = _fewer(rows, train_per_class, split_seed)
        more = [*more, fewer]
    return _listing(root, rows, found.passed_over, [*notes, *more], found.sources)


def unsorted(root: Path | str) -> Listing:
    """Lists every picture below `root`, whatever the folders are; for looking, not for training."""
    root = Path(root)
    found = _scan(root)
    if not found.pictures:
        raise ValueError(f"{root}: no pictures in it; wanted are {' '.join(SUFFIXES)}")
    number = len(found.pictures)
    return Listing(
        ("unsorted",),
        found.pictures,
        [0] * number,
        ["train"] * number,
        tuple(found.passed_over),
        (),
        tuple(found.sources),
    )


def table(
    root: Path | str,
    *,
    table: Path | str,
    val_share: float = 0.1,
    test_share: float = 0.1,
    split_seed: int = 0,
) -> Listing:
    """Lists the pictures that a CSV file names: columns path, label and, where wanted, split and group.

    Paths are relative to `root`. A part that is missing is drawn as in `folder`; pictures of one group (of
    one person, of one scene) then stay in one part, and the shares are met as well as the groups allow.
    """
    root, table = Path(root), Path(table)
    shares = _shares(val_share, test_share)
    _check_folder(root)
    rows, groups = _read_table(root, table)
    if any(split for _, _, split in rows) and not any(split == "train" for _, _, split in rows):
        raise ValueError(f"{table}: no line has the split train")
    rows, notes = _complete(rows, groups, shares, split_seed)
    return _listing(root, rows, (), notes, [os.path.abspath(table)])


def caltech101(
    root: Path | str,
    *,
    train_per_class: int | None = 30,
    test_per_class: int = 50,
    val_per_class: int = 10,
    val_of_train: int = 0,
    split_seed: int = 0,
) -> Listing:
    """Lists Caltech101 as He et al. 2014, §3.3: 30 pictures a category for training, at most 50 for testing.

    `root` is `101_ObjectCategories` or the folder that holds it; BACKGROUND_Google is the 102nd category.
    val is drawn from what training and testing leave over, so that it costs neither of them a picture. Of
    the 9,144 pictures 3,060 are train, 2,995 test and 205 val, and only the 26 categories of more than 80
    pictures have any val: its error is for choosing, never for reporting. With `train_per_class` None the
    same pictures are test and val, and all others train, 5,944 of them. With `val_of_train` val is instead so
    many of each category's training pictures: for choosing settings. A category needs `train_per_class` + 1
    pictures (the smallest, inline_skate, has 31).
    """
    root = Path(root)
    every = train_per_class is None
    train_per_class = TRAIN_PER_CATEGORY if train_per_class is None else train_per_class
    per_class = {"train": train_per_class, "test": test_per_class, "val": val_per_class}
    _check_positive({f"{split}_per_class": value for split, value in per_class.items()})
    if not 0 <= val_of_train < train_per_class:
        raise ValueError(f"val_of_train={val_of_train}: must be 0 or more, and below train_per_class={train_per_class}")
    inside = "101_ObjectCategories/" if (root / "101_ObjectCategories").is_dir() else ""
    found = _scan(root / inside)
    _check_classes(root / inside, found)
    splits = [split for split, number in per_class.items() for _ in range(number)]
    rows: list[Row] = []
    categories = _by_class(found.pictures)
    for name, paths in categories.items():
        _check_enough(root / inside / name, len(paths), "train_per_class", train_per_class)
        ordered = _by_seed(paths, split_seed)
        drawn = zip(ordered, splits, strict=False)  # the protocol leaves the rest unused
        own = [(inside + path, name, split) for path, split in drawn]
        own += [(inside + path, name, "train") for path in ordered[len(splits) :] if every]
        rows += _val_of_train(own, val_of_train) if val_of_train else own
    notes = [f"{len(found.pictures) - len(rows)} of the {len(found.pictures)} pictures are left unused"]
    if len(categories) != 102:
        notes.append(f"{len(categories)} categories; Caltech101 has 102 with BACKGROUND_Google")
    return _listing(root, rows, [inside + path for path in found.passed_over], notes, found.sources)


def _val_of_train(rows: list[Row], number: int) -> list[Row]:
    """The rows of a class with the first training ones as val, and without those that were."""
    train = [row for row in rows if row[2] == "train"]
    chosen = [(path, name, "val") for path, name, _ in train[:number]]
    return [*chosen, *train[number:], *(row for row in rows if row[2] == "test")]


def imagenet(root: Path | str, *, val_per_class: int = 10, split_seed: int = 0) -> Listing:
    """Lists ImageNet 2012: `root/train/<wnid>/…` and `root/val/<wnid>/…`, which is the test split.

    The val split is `val_per_class` pictures a class, drawn from train by seed. If `root/val` is flat, the
    classes are read from `root/LOC_val_solution.csv` (Kaggle's; columns ImageId, PredictionString). Where
    `root/LOC_synset_mapping.txt` is (Kaggle's, or `scripts/prepare_imagenet.py`'s), the class n01440764 is
    called "n01440764 tench"; without it, n01440764. The labels are the same.
    """
    root = Path(root)
    _check_positive({"val_per_class": val_per_class})
    train, test = _scan(root / "train"), _scan(root / "val")
    _check_classes(root / "train", train)
    mapping = root / "LOC_synset_mapping.txt"
    names = _read_mapping(mapping)
    rows: list[Row] = []
    for wnid, paths in _by_class(train.pictures).items():
        _check_enough(root / "train" / wnid, len(paths), "val_per_class", val_per_class)
        ordered, name = _by_seed(paths, split_seed), names.get(wnid, wnid)
        rows += [(f"train/{path}", name, "val") for path in ordered[:val_per_class]]
        rows += [(f"train/{path}", name, "train") for path in ordered[val_per_class:]]
    solution = root / "LOC_val_solution.csv"
    wnids = _read_solution(solution) if any("/" not in path for path in test.pictures) else {}
    for path in test.pictures:
        of = path.split("/")[0] if "/" in path else wnids.get(posixpath.splitext(path)[0])
        if of is None:
            raise ValueError(f"{root / 'val' / path}: {solution} does not name this picture")
        rows.append((f"val/{path}", names.get(of, of), "test"))
    passed_over = [f"train/{path}" for path in train.passed_over] + [f"val/{path}" for path in test.passed_over]
    sources = [*train.sources, *test.sources, *([os.path.abspath(solution)] if wnids else []), os.path.abspath(mapping)]
    notes = ["ImageNet's val is the test split; val is drawn from train by seed"]
    return _listing(root, rows, passed_over, notes, sources)


def shapes(root: Path | str, *, seed: int = 0) -> Listing:
    """Lists the pictures that `make_shapes` draws into `root`."""
    from .shapes import make_shapes

    make_shapes(Path(root), seed=seed)
    return folder(root)


# What lies there


@dataclass(frozen=True)
class _Found:
    """What lies below the folder `root`: paths relative to it, sorted."""

    root: Path
    pictures: list[str]
    passed_over: list[str]
    folders: list[str]

    @property
    def sources(self) -> list[str]:
        """The folders that were listed."""
        return [os.path.abspath(self.root / folder) for folder in ("", *self.folders)]


def is_left_behind(name: str) -> bool:
    """Whether a file or folder is none of the user's, but hidden, or left behind by a Mac or a NAS."""
    return name.startswith(".") or name in THUMBNAILS


def _scan(root: Path) -> _Found:
    """Everything below `root`; links to folders are followed."""
    _check_folder(root)
    pictures: list[str] = []
    passed_over: list[str] = []
    folders: list[str] = []
    todo = [""]
    try:
        while todo:
            inside = todo.pop()
            with os.scandir(os.path.join(root, inside)) as entries:
                for entry in entries:
                    path = inside + entry.name
                    if is_left_behind(entry.name):
                        passed_over.append(path)
                    elif entry.is_dir():
                        _check_link(entry)
                        todo.append(path + "/")
                        folders.append(path)
                    elif entry.name.lower().endswith(SUFFIXES):
                        pictures.append(path)
                    else:
                        passed_over.append(path)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    return _Found(root, sorted(pictures), sorted(passed_over), sorted(folders))


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise ValueError(f"{root}: does not exist; wanted is a folder of pictures")
    if not root.is_dir():
        raise ValueError(f"{root}: is a file; wanted is a folder of pictures")


def _check_link(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        here = Path(os.path.realpath(os.path.dirname(entry.path)))
        if Path(os.path.realpath(entry.path)) in (here, *here.parents):
            raise ValueError(f"{entry.path}: links to a folder that holds it: remove the link")


def _check_classes(root: Path, found: _Found) -> None:
    """`root` holds two class folders or more, each with pictures, and no picture outside them."""
    if not found.pictures:
        raise ValueError(f"{root}: no pictures in it; wanted are {' '.join(SUFFIXES)}")
    _check_loose(root, found)
    classes = {path.split("/", 1)[0] for path in found.pictures}
    empty = [path for path in found.folders if "/" not in path and path not in classes]
    if empty:
        raise ValueError(f"{root / empty[0]}: no pictures in this class folder{_more(empty)}; fill or remove it")
    if len(classes) == 1:
        raise ValueError(f"{root}: only one class, {classes.pop()!r}; wanted are two or more")


def _check_loose(root: Path, found: _Found) -> None:
    loose = [path for path in found.pictures if "/" not in path]
    if loose:
        raise ValueError(f"{root / loose[0]}: is in no class folder{_more(loose)}; move it to {root}/<class>/")


def _check_enough(path: Path, pictures: int, name: str, value: int) -> None:
    if pictures <= value:
        raise ValueError(f"{path}: has {pictures} pictures, but {name}={value} needs {value + 1} or more")


def _check_positive(arguments: Mapping[str, int]) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")


def _more(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


def _by_class(pictures: Iterable[str]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = defaultdict(list)
    for path in pictures:
        by_class[path.split("/", 1)[0]].append(path)
    return by_class


def _rows_of_parts(root: Path, found: _Found, parts: Mapping[str, str]) -> list[Row]:
    """`root/<part>/<class>/…`; `parts` says which split each top folder is."""
    if "train" not in parts.values():
        raise ValueError(f"{root}: has {', '.join(parts)}, but no folder train")
    if len(set(parts.values())) < len(parts):
        raise ValueError(f"{root}: has {', '.join(parts)}; wanted is one folder for each of train, val, test")
    rows: list[Row] = []
    for top, split in parts.items():
        part = _below(found, top)
        if split == "train":
            _check_classes(root / top, part)
        _check_loose(root / top, part)
        rows += [(f"{top}/{path}", path.split("/", 1)[0], split) for path in part.pictures]
    return rows


def _below(found: _Found, top: str) -> _Found:
    def cut(paths: list[str]) -> list[str]:
        return [path[len(top) + 1 :] for path in paths if path.startswith(top + "/")]

    return _Found(found.root / top, cut(found.pictures), cut(found.passed_over), cut(found.folders))


# Tables


def _read_table(root: Path, table: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows, and the group of each path (empty without a column group)."""
    rows: list[Row] = []
    groups: dict[str, str] = {}
    lines: dict[str, int] = {}  # path → where it stands
    split_of: dict[str, tuple[str, int]] = {}  # group → its split, and a line that says so
    for line, row in _csv(table, ("path", "label")):
        where = f"{table}, line {line}"
        if not row["path"]:
            raise ValueError(f"{where}: the path is empty")
        if not row["label"]:
            raise ValueError(f"{where}: the label is empty")
        if os.path.isabs(row["path"]):
            raise ValueError(f"{where}: {row['path']} is absolute; wanted is a path relative to {root}")
        path = posixpath.normpath(Path(row["path"]).as_posix())
        if path in lines:
            raise ValueError(f"{where}: {path} stands already in line {lines[path]}")
        if not os.path.isfile(root / path):
            raise ValueError(f"{where}: {root / path} is not there")
        lines[path] = line
        split = ""
        if "split" in row:
            if row["split"].lower() not in SPLIT_WORDS:
                raise ValueError(f"{where}: the split is {row['split']!r}; wanted is train, val or test")
            split = SPLIT_WORDS[row["split"].lower()]
        if "group" in row:
            if not row["group"]:
                raise ValueError(f"{where}: the group is empty; wanted is a name, even for one picture")
            other, first = split_of.setdefault(row["group"], (split, line))
            if other != split:
                raise ValueError(f"{where}: the group {row['group']!r} is in {split} here, in {other} in line {first}")
            groups[path] = row["group"]
        rows.append((path, row["label"], split))
    if len({name for _, name, _ in rows}) == 1:
        raise ValueError(f"{table}: only one label, {rows[0][1]!r}; wanted are two or more")
    if not rows:
        raise ValueError(f"{table}: names no pictures")
    return rows, groups


def _read_solution(solution: Path) -> dict[str, str]:
    """Picture (without suffix) → wnid."""
    if not solution.is_file():
        raise ValueError(
            f"{solution.parent / 'val'}: is flat, and {solution} is not there; "
            "sort the pictures into val/<wnid>/ or lay Kaggle's LOC_val_solution.csv there"
        )
    wnids: dict[str, str] = {}
    for line, row in _csv(solution, ("ImageId", "PredictionString")):
        if not row["PredictionString"]:
            raise ValueError(f"{solution}, line {line}: the PredictionString is empty; it begins with the wnid")
        wnids[row["ImageId"]] = row["PredictionString"].split()[0]
    return wnids


def _read_mapping(mapping: Path) -> dict[str, str]:
    """wnid → wnid and first name, of lines like `n01440764 tench, Tinca tinca`; empty where there is no such file."""
    names: dict[str, str] = {}
    try:
        lines = mapping.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return names
    except UnicodeDecodeError as error:
        raise ValueError(f"{mapping}: is not UTF-8: {error.reason}") from error
    for number, line in enumerate(lines, start=1):
        wnid, _, words = line.strip().partition(" ")
        name = words.split(",")[0].strip()
        if wnid and not name:
            raise ValueError(f"{mapping}, line {number}: {line.strip()!r}; wanted is a wnid and its names")
        if wnid:
            names[wnid] = f"{wnid} {name}"  # two classes of ImageNet are called crane
    return names


def _csv(path: Path, columns: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    """(line number, column → text without blanks around it) of each row; `columns` must be there."""
    if not path.is_file():
        raise ValueError(f"{path}: does not exist; wanted is a CSV file with the columns {', '.join(columns)}")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            header = [name.strip() for name in next(reader, [])]
            for name in columns:
                if name not in header:
                    raise ValueError(f"{path}, line 1: no column {name}; it has {', '.join(header) or 'none'}")
            for fields in reader:
                if not fields:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(fields) != len(header):
                    raise ValueError(f"{where}: {len(fields)} fields, but the header has {len(header)}")
                yield reader.line_num, {n: field.strip() for n, field in zip(header, fields, strict=True)}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8: {error.reason}") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


# Splits


def _shares(val_share: float, test_share: float) -> dict[str, float]:
    for name, share in (("val_share", val_share), ("test_share", test_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name}={share}: must be above 0 and below 1")
    if val_share + test_share >= 1:
        raise ValueError(f"val_share={val_share}, test_share={test_share}: must be below 1 together")
    return {"test": test_share, "val": val_share}


def _by_seed(names: Iterable[str], seed: int) -> list[str]:
    """`names` in an order of chance that depends on nothing but the seed and the names."""

    def key(name: str) -> bytes:
        text = f"{seed}/{name}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=16).digest()

    return sorted(names, key=key)


def _complete(
    rows: list[Row], groups: Mapping[str, str], shares: Mapping[str, float], seed: int
) -> tuple[list[Row], list[str]]:
    """Draws the parts that `rows` lack: the rows with all three splits, and notes on what was done."""
    given = {split for _, _, split in rows} - {""}
    notes = []
    if given == {"train", "val"}:
        rows = [(path, name, "test" if split == "val" else split) for path, name, split in rows]
        missing = ["val"]
        notes.append(VAL_IS_TEST)
    else:
        missing = [split for split in ("test", "val") if split not in given]
        if given and missing:
            notes.append(f"{' and '.join(missing)} drawn from train by seed")
    open_rows = {path: name for path, name, split in rows if split in ("", "train")}
    shares = {split: shares[split] for split in missing}
    draw = _draw_groups(open_rows, groups, shares, seed) if groups else _draw(open_rows, shares, seed)
    return [(path, name, draw.get(path, split or "train")) for path, name, split in rows], notes


def _fewer(rows: list[Row], train_per_class: int, seed: int) -> tuple[list[Row], str]:
    """The rows without training pictures beyond so many of a class, and a note on it."""
    by_class: dict[str, list[str]] = defaultdict(list)
    for path, name, split in rows:
        if split == "train":
            by_class[name].append(path)
    kept = {path for paths in by_class.values() for path in _by_seed(paths, seed)[:train_per_class]}
    left = [row for row in rows if row[2] != "train" or row[0] in kept]
    return left, f"{train_per_class} training pictures of each class; {len(rows) - len(left)} are left unused"


def _numbers(pictures: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Of how many pictures each part should be: one at least, but one must be left for train."""
    numbers = {split: max(1, int(pictures * share + 0.5)) for split, share in shares.items()}
    while numbers and sum(numbers.values()) >= pictures:
        largest = max(reversed(numbers), key=lambda split: numbers[split])  # of equals the last: val before test
        numbers[largest] -= 1
    return numbers


def _draw(rows: Mapping[str, str], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Path → split of what is drawn from `rows` (path → class), class by class."""
    drawn: dict[str, str] = {}
    by_class: dict[str, list[str]] = defaultdict(list)
    for path, name in rows.items():
        by_class[name].append(path)
    for paths in by_class.values():
        ordered = iter(_by_seed(paths, seed))
        for split, number in _numbers(len(paths), shares).items():
            drawn.update((next(ordered), split) for _ in range(number))
    return drawn


def _draw_groups(
    rows: Mapping[str, str], groups: Mapping[str, str], shares: Mapping[str, float], seed: int
) -> dict[str, str]:
    """As `_draw`, but whole groups, and never the last group of a class in train."""
    classes: dict[str, Counter[str]] = defaultdict(Counter)  # group → class → pictures
    for path, name in rows.items():
        classes[groups[path]][name] += 1
    left = Counter(rows.values())  # class → pictures still in train
    numbers = {name: _numbers(pictures, shares) for name, pictures in left.items()}
    ordered = _by_seed(classes, seed)
    drawn: dict[str, str] = {}
    for split in shares:
        need = {name: numbers[name][split] for name in sorted(left)}
        free = {group: classes[group] for group in ordered if group not in drawn}
        drawn.update((group, split) for group in _choose(free, need, left))
    return {path: drawn[groups[path]] for path in rows if groups[path] in drawn}


def _choose(free: Mapping[str, Counter[str]], need: dict[str, int], left: Counter[str]) -> list[str]:
    """The groups for a part that should have `need` pictures of each class; `free` gives their order.

    First those that fit into what is needed still; then those that bring the numbers nearer to it; last, for
    a class that has none so far, the one that takes them least far from it. Keeps `need` and `left` true.
    """
    chosen: dict[str, None] = {}
    lacking = {name for name, number in need.items() if number}

    def able(group: str) -> bool:
        return group not in chosen and all(left[name] > number for name, number in free[group].items())

    def fits(group: str) -> bool:
        return all(need[name] >= number for name, number in free[group].items())

    def gain(group: str) -> int:  # by how much the squared distance to the need falls
        return sum(number * (2 * need[name] - number) for name, number in free[group].items())

    def choose(group: str) -> None:
        chosen[group] = None
        for name, number in free[group].items():
            need[name] -= number
            left[name] -= number
            lacking.discard(name)

    for good in (fits, lambda group: gain(group) > 0):
        for group in free:
            if able(group) and good(group):
                choose(group)
    for name in sorted(lacking):
        groups = [group for group in free if name in free[group] and able(group)]
        if name in lacking and groups:
            choose(max(groups, key=gain))
    return list(chosen)


def _listing(
    root: Path, rows: list[Row], passed_over: Iterable[str], notes: Iterable[str], sources: Iterable[str]
) -> Listing:
    """Sorts `rows`; every class must be in train, and every split must have a picture."""
    rows.sort()
    classes = {split: {name for _, name, s in rows if s == split} for split in ("train", "val", "test")}
    for path, name, split in rows:
        if name not in classes["train"]:
            raise ValueError(f"{root / path}: its class {name!r} is in {split}, but not in train")
    notes = list(notes)
    for split, names in classes.items():
        if not names:
            raise ValueError(f"{root}: no picture is left for {split}; wanted are 3 or more of some class")
        lacking = sorted(classes["train"] - names)
        if lacking:
            first = ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
            notes.append(f"{len(lacking)} of {len(classes['train'])} classes have no picture in {split}: {first}")
    label = {name: number for number, name in enumerate(sorted(classes["train"]))}
    return Listing(
        classes=tuple(label),
        paths=[path for path, _, _ in rows],
        labels=[label[name] for _, name, _ in rows],
        splits=[split for _, _, split in rows],
        passed_over=tuple(passed_over),
        notes=tuple(notes),
        sources=tuple(sources),
    )
