"""`spp check`: reads every file of a data set, strictly, and says what is in it and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from .door import fail, names_apart, open_door, quoted
from .whole import write_whole
from .words import printable

if TYPE_CHECKING:
    from .data import Index
    from .data.index import Layout

FIRST = 3  # names that the text gives of a list; JSON has them all
POINTS = {"smallest": 0, "p1": 1, "p5": 5, "median": 50, "p95": 95, "p99": 99, "largest": 100}  # name → %


def report(index: Index, region: int, resize: int) -> dict[str, Any]:
    """What is in `index`, in numbers and whole lists of names, as JSON takes it.

    Sizes are those of upright pictures, each at the `POINTS` of its distribution and with the file at either end; null
    where no picture is good. `region` and `resize` are in px. Duplicates are files of the same bytes.
    """
    from .data.index import SPLITS

    per_class = {
        split: np.bincount(index.labels[index.rows(split)], minlength=len(index.classes)).tolist() for split in SPLITS
    }
    orientations = Counter(index.orientations.tolist())
    kinds = Counter(index.kinds.tolist())
    widths, heights = index.widths.astype(np.int64), index.heights.astype(np.int64)
    shorter = np.minimum(widths, heights)
    return {
        "root": str(index.root),
        "pictures": len(index),
        "bytes": int(index.num_bytes.sum()),
        "splits": index.counts,
        "classes": {
            name: {split: per_class[split][label] for split in SPLITS} for label, name in enumerate(index.classes)
        },
        "kinds": {index.kind_names[kind]: number for kind, number in kinds.most_common()},
        "exif_orientations": {str(orientation): number for orientation, number in sorted(orientations.items())},
        "width": _spread(widths, index),
        "height": _spread(heights, index),
        "aspect_ratio": _spread(widths / heights, index),
        "megapixels": _spread(widths * heights / 1e6, index),
        "region": region,
        "below_region": index.paths.take(np.flatnonzero(shorter < region)),
        "resize": resize,
        "below_resize": index.paths.take(np.flatnonzero(shorter < resize)),
        "duplicates": _duplicates(index),
        "bad": [bad._asdict() for bad in index.bad],
        "passed_over": list(index.passed_over),
        "notes": list(index.notes),
    }


def _spread(values: npt.NDArray[Any], index: Index) -> dict[str, Any] | None:
    if not len(values):
        return None
    points = np.percentile(values, list(POINTS.values())).tolist()
    ends = {"smallest_path": index.paths[int(values.argmin())], "largest_path": index.paths[int(values.argmax())]}
    return {**dict(zip(POINTS, points, strict=True)), **ends}


def _duplicates(index: Index) -> dict[str, Any]:
    """Groups of pictures of the same bytes: those of one split, those of several, and, of both, those of several
    classes; then the pictures of val and of test that are in train, too."""
    from .data.index import SPLITS

    head = np.ascontiguousarray(index.hashes[:, :8]).view(np.uint64)[:, 0]
    _, inverse, numbers = np.unique(head, return_inverse=True, return_counts=True)
    rows_of: dict[bytes, list[int]] = defaultdict(list)
    for row in np.flatnonzero((numbers[inverse] > 1) & index.hashes.any(1)).tolist():
        rows_of[bytes(index.hashes[row])].append(row)
    found: dict[str, Any] = {
        "in_one_split": [],
        "between_splits": [],
        "of_several_classes": [],
        "val_in_train": [],
        "test_in_train": [],
    }
    for rows in (rows for rows in rows_of.values() if len(rows) > 1):
        group = [
            {
                "path": index.paths[row],
                "split": SPLITS[index.splits[row]],
                "class": index.classes[index.labels[row]],
            }
            for row in rows
        ]
        splits = {each["split"] for each in group}
        found["in_one_split" if len(splits) == 1 else "between_splits"].append(group)
        if len({each["class"] for each in group}) > 1:
            found["of_several_classes"].append(group)
        if "train" in splits:
            for split in ("val", "test"):
                found[f"{split}_in_train"] += [each["path"] for each in group if each["split"] == split]
    return found


def text(found: dict[str, Any]) -> str:
    """A report for people: every bad file, and of all other lists the first names."""
    pictures, bad, duplicates = found["pictures"], found["bad"], found["duplicates"]
    is_data_set, size = "no_data_set" not in found, _bytes(found["bytes"])  # else classes and parts are guesses
    lines = [found["root"]]
    if is_data_set:
        lines.append(_line("pictures", f"{pictures:,} of {len(found['classes']):,} classes, {size}"))
        lines.append(_line("splits", ", ".join(f"{split} {number:,}" for split, number in found["splits"].items())))
    else:
        lines += [_line("no data set", found["no_data_set"]), _line("pictures", f"{pictures:,}, {size}")]
    if pictures and is_data_set:
        numbers = {name: counts["train"] for name, counts in found["classes"].items()}
        least, most = min(numbers, key=lambda name: numbers[name]), max(numbers, key=lambda name: numbers[name])
        balance = f"{numbers[least]:,} ({least}) to {numbers[most]:,} ({most}) training pictures a class"
        if numbers[least] == numbers[most]:
            balance = f"{numbers[least]:,} training pictures each"
        lines.append(_line("classes", balance))
    if pictures:
        turned = pictures - found["exif_orientations"].get("1", 0)
        lines += [
            _line("kinds", ", ".join(f"{kind} {number:,}" for kind, number in found["kinds"].items())),
            _line(
                "EXIF", f"{_share(turned, pictures)} are turned by it; sizes are upright" if turned else "turns none"
            ),
            "",
            _line("", "".join(f"{name[1:] + ' %' if name[0] == 'p' else name:>10}" for name in POINTS)),
        ]
        measures = {
            "width px": "width",
            "height px": "height",
            "width/height": "aspect_ratio",
            "megapixels": "megapixels",
        }
        for name, key in measures.items():
            lines.append(_line(name, "".join(f"{_number(found[key][point]):>10}" for point in POINTS)))
        lines.append("")
        ends = (
            ("narrowest", "aspect_ratio", "smallest"),
            ("widest", "aspect_ratio", "largest"),
            ("most pixels", "megapixels", "largest"),
        )
        differ = [end for end in ends if found[end[1]]["smallest"] < found[end[1]]["largest"]]
        lines += [_line(name, found[key][f"{end}_path"]) for name, key, end in differ]
        lines += [""] if differ else []
        for title, key in (("enlarged", "resize"), ("", "region")):
            small = found[f"below_{key}"]
            what = f"{_share(len(small), pictures)} with a shorter side below data.{key}={found[key]} px"
            lines.append(_line(title, what + (f": {_first(small)}" if small else "")))
    lines += ["", *_duplicate_lines(duplicates)]
    if found["passed_over"]:
        passed = found["passed_over"]
        lines.append(_line("passed over", f"{len(passed):,}, by their names no pictures: {_first(passed)}"))
    lines += [_line("note", note) for note in found["notes"]]
    lines.append(_line("bad", f"{_share(len(bad), len(bad) + pictures)} of the files" if bad else "none"))
    lines += [f"  {each['path']}: {each['reason']}" for each in bad]
    return "\n".join(map(printable, lines)) + "\n"


def _duplicate_lines(duplicates: dict[str, Any]) -> list[str]:
    groups = len(duplicates["in_one_split"]) + len(duplicates["between_splits"])
    if not groups:
        return [_line("duplicates", "none")]
    lines = [_line("duplicates", f"{groups:,} groups of files of the same bytes")]
    for key, what, mark in (
        ("in_one_split", "inside one split", "split"),
        ("between_splits", "between splits", "split"),
        ("of_several_classes", "with different classes", "class"),
    ):
        if duplicates[key]:
            lines.append(_line("", f"{len(duplicates[key]):,} {what}"))
        for group in duplicates[key][:FIRST]:
            names = [f"{each['path']} ({each[mark]})" for each in group[: FIRST + 1]]
            more = f" = … ({len(group) - len(names):,} more)" if len(group) > len(names) else ""
            lines.append(_line("", f"  {' = '.join(names)}{more}"))
        if len(duplicates[key]) > FIRST:
            lines.append(_line("", "  …"))
    for split in ("val", "test"):
        leaked = duplicates[f"{split}_in_train"]
        if leaked:
            lines.append(_line("", f"{len(leaked):,} {split} pictures are in train, too: {_first(leaked)}"))
    return lines


def _line(title: str, what: str) -> str:
    return f"{title:<14}{what}".rstrip()


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:FIRST]) + (", …" if len(names) > FIRST else "")


def _share(number: int, of: int) -> str:
    return f"{number:,} ({number / of:.1%})" if number else "0"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{_number(number)} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"


def run(config: DictConfig) -> None:
    """Everything that `spp check` does with a config; exit code 1 if there is a bad file."""
    if config.format not in ("text", "json"):
        raise ValueError(f"format={config.format}: use text or json")
    if config.output and Path(str(config.output)).is_dir():  # said before an hour of reading
        raise ValueError(f"output={config.output}: is a folder; name a file")
    for key in ("root", "layout", "region", "resize"):
        if config.data.get(key) is None:
            raise ValueError(f"data.{key} has no value: give one, like data.{key}=…")
    try:
        from . import build

        layout = build.instantiate(config.data.layout, "data.layout")
        index, fault = _index(Path(str(config.data.root)), layout, config.again)
    except KeyboardInterrupt:
        print("spp check: interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    found = {**report(index, config.data.region, config.data.resize), **({"no_data_set": fault} if fault else {})}
    said = text(found) if config.format == "text" else json.dumps(found, indent=2) + "\n"
    if config.output:
        try:
            write_whole(Path(str(config.output)), said)
        except OSError as error:
            raise ValueError(f"output={config.output}: {error.strerror}; name a file that can be written") from error
    else:
        print(said, end="")
    if index.bad or fault:
        sys.exit(1)


def _index(root: Path, layout: Layout, again: bool) -> tuple[Index, str | None]:
    """The index of all files, and what keeps them from being a data set, if anything does."""
    from .data import make_index
    from .data.layouts import unsorted

    try:
        return make_index(root, layout, whole=True, refresh=True, again=again), None
    except ValueError as error:
        try:  # the files can be looked at all the same
            return make_index(root, unsorted, whole=True, refresh=True, again=again), str(error)
        except ValueError:
            raise error from None


def main(arguments: list[str] | None = None) -> None:
    """The door; a word that names a folder or is no key=value is `data.root`."""
    roots, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    given = [*roots, *(word for word in others if word.startswith("data.root="))]
    if "" in roots:
        fail("check", "the folder's name is empty: name a folder")
    if len(given) > 1:
        fail("check", f"{' '.join(given)}: one data set at a time; name one folder")
    open_door("check", run, [*(f"data.root={quoted(root)}" for root in roots), *others])


if __name__ == "__main__":
    main()
