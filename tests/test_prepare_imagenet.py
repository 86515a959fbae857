"""`scripts/prepare_imagenet.py` on a miniature of the official archives: what is made of them, and what is refused."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Spp
from PIL import Image
from scipy.io import savemat

from spp_cls.data.index import make_index
from spp_cls.data.layouts import imagenet
from spp_cls.door import check, conf_folder

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_imagenet.py"
WNIDS = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane", "n04254120": "soap dispenser"}
PICTURES = {"n01440764": 6, "n02012849": 5, "n03126707": 7, "n04254120": 6}
IDS = {"n02012849": 1, "n04254120": 2, "n01440764": 3, "n03126707": 4}  # not in the order of the wnids, as there
VAL = ["n03126707", "n01440764", "n01440764", "n04254120", "n02012849", "n03126707", "n02012849", "n04254120"]

Member = tuple[str, bytes]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_imagenet", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_imagenet"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


# The miniature


def picture(number: int, mode: str = "RGB", format: str = "JPEG") -> bytes:
    """A picture of its own content; the kinds are those of the real set."""
    chance = np.random.default_rng(number)
    width, height = (int(side) for side in chance.integers(40, 91, 2))
    coarse = Image.fromarray(chance.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height))
    coarse.convert(mode).save(out := io.BytesIO(), format)
    return out.getvalue()


def tarred(members: Iterable[Member | tarfile.TarInfo], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(bytes(member.size)))
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def meta(pictures: dict[str, int] = PICTURES, ids: dict[str, int] = IDS) -> bytes:
    """`meta.mat`: a struct array (n, 1) of the leaves in the order of their numbers, and the synsets above them."""
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    leaves = [
        (number, wnid, WNIDS[wnid], "what it is", 0, np.zeros((1, 0)), 0, pictures[wnid])
        for wnid, number in sorted(ids.items(), key=lambda item: item[1])
    ]
    above = [
        (5, "n02010000", "wading bird, wader", "a bird", 1, np.array([[1]]), 1, 0),
        (6, "n00001740", "entity", "all of it", 4, np.array([[2, 3, 4, 5]]), 2, 0),
    ]
    synsets = np.empty((len(leaves) + len(above), 1), [(name, "O") for name in fields])
    for row, values in enumerate([*leaves, *above]):
        synsets[row, 0] = values
    savemat(out := io.BytesIO(), {"synsets": synsets})
    return out.getvalue()


def devkit(mat: bytes | None = None, answers: list[int] | None = None) -> bytes:
    numbers = [IDS[wnid] for wnid in VAL] if answers is None else answers
    text = "".join(f"{number}\n" for number in numbers)
    folder = tarfile.TarInfo("ILSVRC2012_devkit_t12/data")
    folder.type = tarfile.DIRTYPE
    return tarred(
        [
            folder,
            ("ILSVRC2012_devkit_t12/readme.txt", b"Introduction"),
            ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text.encode()),
            ("ILSVRC2012_devkit_t12/data/meta.mat", meta() if mat is None else mat),
        ],
        "w:gz",
    )


def train_members(wnid: str) -> list[Member]:
    first = 1000 * IDS[wnid]
    return [(f"{wnid}_{first + 7 * i}.JPEG", picture(first + i)) for i in range(PICTURES[wnid])]


def val_members() -> list[Member]:
    return [(f"ILSVRC2012_val_{i:08}.JPEG", picture(i)) for i in range(1, len(VAL) + 1)]


@pytest.fixture(scope="module")
def official() -> dict[str, bytes]:
    """The three archives, by their names, with the odd files of the real ones: grey, CMYK, a PNG called .JPEG."""
    classes = {wnid: train_members(wnid) for wnid in WNIDS}
    odd = {"n01440764": ("L", "JPEG"), "n02012849": ("RGB", "PNG"), "n03126707": ("CMYK", "JPEG")}
    for wnid, (mode, format) in odd.items():
        name, _ = classes[wnid][2]
        classes[wnid][2] = (name, picture(77, mode, format))
    return {
        "ILSVRC2012_img_train.tar": tarred((f"{wnid}.tar", tarred(members)) for wnid, members in classes.items()),
        "ILSVRC2012_img_val.tar": tarred(val_members()),
        "ILSVRC2012_devkit_t12.tar.gz": devkit(),
    }


def lay(folder: Path, files: dict[str, bytes], **changed: bytes) -> Path:
    """The archives in `folder`; `changed` are train, val or devkit."""
    names = {name.split("_")[-1].split(".")[0]: name for name in files}  # train, val, t12
    names["devkit"] = names.pop("t12")
    folder.mkdir()
    for short, name in names.items():
        (folder / name).write_bytes(changed.get(short, files[name]))
    return folder


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What comes out


def expected(official: dict[str, bytes]) -> dict[str, bytes]:
    """Path → bytes of the whole of ROOT, by Python's own unpacking."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(official["ILSVRC2012_img_train.tar"])) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for each in inner:
                    data = inner.extractfile(each)
                    assert data is not None
                    found[f"train/{member.name[:9]}/{each.name}"] = data.read()
    for wnid, (name, data) in zip(VAL, val_members(), strict=True):
        found[f"val/{wnid}/{name}"] = data
    lines = (f"{wnid} {words}\n" for wnid, words in WNIDS.items())
    return found | {"LOC_synset_mapping.txt": "".join(lines).encode()}


def test_every_picture_comes_to_its_place_and_nothing_else(
    script: ModuleType, official: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archives, root = lay(tmp_path / "archives", official), tmp_path / "a" / "imagenet"
    script.main([str(archives), str(root)])
    assert below(root) == expected(official)
    assert below(archives) == official
    assert capsys.readouterr().out == (
        f"{root}: 24 pictures in train, 8 in val, of 4 classes\nnext: spp check data=imagenet data.root={root}\n"
    )
    listing = imagenet(root, val_per_class=1)
    assert listing.classes == (
        "n01440764 tench",
        "n02012849 crane",
        "n03126707 crane",
        "n04254120 soap dispenser",
    )
    answers = {p.rpartition("_")[2]: listing.classes[k][:9] for p, k in zip(listing.paths, listing.labels, strict=True)}
    assert [answers[f"{i:08}.JPEG"] for i in range(1, 9)] == VAL
    index = make_index(root, lambda path: listing, whole=True, progress=False)
    assert not index.bad and len(index) == 32
    assert set(index.kind_names) == {"JPEG RGB", "JPEG L", "JPEG CMYK", "PNG RGB"}


def test_typed_again_it_passes_over_what_is_there(
    script: ModuleType, official: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives, root = lay(tmp_path / "archives", official), tmp_path / "imagenet"
    script.prepare(archives, root)
    (root / "LOC_synset_mapping.txt").write_text("n01440764 mine\n")  # what lies there is the user's
    parts: list[str] = []
    extract = script.extract
    monkeypatch.setattr(script, "extract", lambda *words: parts.append(words[2].folder.name) or extract(*words))
    script.prepare(archives, root)
    assert parts == []
    for path in (root / "train" / "n03126707").iterdir():
        path.unlink()
    (root / "train" / "n03126707").rmdir()
    script.prepare(archives, root)
    assert parts == ["n03126707"]
    wanted = expected(official) | {"LOC_synset_mapping.txt": b"n01440764 mine\n"}
    assert below(root) == wanted


@pytest.mark.parametrize("at", range(0, 33, 4))
def test_killed_at_any_picture_it_leaves_whole_folders_and_goes_on(
    script: ModuleType, official: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    archives, root = lay(tmp_path / "archives", official), tmp_path / "imagenet"
    wanted, left = expected(official), [at]

    class Killed(BaseException):
        pass

    def contents(*words: Any) -> Iterable[bytes]:
        left[0] -= 1
        for chunk in script_contents(*words):
            yield chunk[: len(chunk) // 2]
            if left[0] == -3:  # two files of the devkit come first
                raise Killed
            yield chunk[len(chunk) // 2 :]

    script_contents = script.contents
    with monkeypatch.context() as patch:
        patch.setattr(script, "contents", contents)
        patch.setattr(script.shutil, "rmtree", lambda *_, **__: None)  # a kill tidies nothing up
        if at < 32:
            with pytest.raises(Killed):
                script.prepare(archives, root)
            found = {path: data for path, data in below(root).items() if ".part" not in path}
            assert found.items() <= wanted.items()
            counts = {folder: sum(path.startswith(folder) for path in found) for folder in ("val", *WNIDS)}
            assert set(counts.values()) <= {0, 8, *PICTURES.values()}
        else:
            script.prepare(archives, root)
    script.prepare(archives, root)
    assert below(root) == wanted


def test_killed_as_a_process(official: dict[str, bytes], tmp_path: Path) -> None:
    archives, root = lay(tmp_path / "archives", official), tmp_path / "imagenet"
    program = [sys.executable, str(SCRIPT), str(archives), str(root)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    while process.poll() is None and not root.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{root}: 24 pictures in train, 8 in val, of 4 classes\n")
    assert done.stderr == "" and below(root) == expected(official)


# What is refused


@pytest.fixture
def refused(
    script: ModuleType, official: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Lays the archives with what is changed, and gives the one line that they are refused with, by its end."""

    def try_it(*options: str, written: int = 0, **changed: bytes) -> str:
        archives = lay(tmp_path / "archives", official, **changed)
        before = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as end:
            script.main([str(archives), str(tmp_path / "imagenet"), *options])
        assert end.value.code == 2
        root = tmp_path / "imagenet"
        kept = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*") if not p.is_relative_to(root)}
        assert {k: v for k, v in kept.items() if k != str(tmp_path)} == {
            k: v for k, v in before.items() if k != str(tmp_path)
        }
        assert len(below(root)) == written and root.exists() == bool(written)
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and said.out == ""
        (name,) = re.findall(r"^prepare_imagenet\.py: (.*)\n$", said.err)
        return str(name).replace(f"{archives}/", "").replace(str(root), "ROOT")

    return try_it


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BAD: dict[str, Member | tarfile.TarInfo] = {
    "absolute": ("/etc/passwd", b"x"),
    "up": ("../../escaped.JPEG", b"x"),
    "up_inside": ("n01440764/../../escaped.JPEG", b"x"),
    "deep": ("a/" * 2000 + "x.JPEG", b"x"),
    "folder": special("n01440764", tarfile.DIRTYPE),
    "other_class": ("n02012849_1.JPEG", b"x"),
    "other_suffix": ("n01440764_1.jpg", b"x"),
    "newline": ("n01440764_1.JPEG\n", b"x"),
    "letters": ("n01440764_١.JPEG", b"x"),
    "backslash": ("n01440764\\1.JPEG", b"x"),
    "symlink": special("n01440764_1.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
    "hardlink": special("n01440764_1.JPEG", tarfile.LNKTYPE, "../../../archives/ILSVRC2012_img_val.tar"),
    "device": special("n01440764_1.JPEG", tarfile.CHRTYPE),
    "block": special("n01440764_1.JPEG", tarfile.BLKTYPE),
    "pipe": special("n01440764_1.JPEG", tarfile.FIFOTYPE),
    "sparse": special("n01440764_1.JPEG", tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_a_member_of_a_class_that_is_not_the_official_one(
    refused: Callable[..., str], official: dict[str, bytes], what: str, first: bool
) -> None:
    bad = BAD[what]
    name = bad.name if isinstance(bad, tarfile.TarInfo) else bad[0]
    members = train_members("n01440764")
    inner = tarred([bad, *members] if first else [*members, bad])
    line = refused(train=with_class(official, "n01440764", inner), written=len(VAL))  # val was whole before
    start = f"ILSVRC2012_img_train.tar: n01440764.tar: its member {ascii(name[:80])[:-1]}"
    assert line.startswith(start), line
    assert re.search(r"is (a|no) \w+|does not belong there; wanted are n01440764_<number>\.JPEG$", line)


def with_class(official: dict[str, bytes], wnid: str, inner: bytes) -> bytes:
    """The archive of train with another tar for one class."""
    members: list[Member] = []
    with tarfile.open(fileobj=io.BytesIO(official["ILSVRC2012_img_train.tar"])) as outer:
        for member in outer:
            data = outer.extractfile(member)
            assert data is not None
            members.append((member.name, inner if member.name == f"{wnid}.tar" else data.read()))
    return tarred(members)


@pytest.mark.parametrize("what", BAD)
def test_a_member_of_val_that_is_not_the_official_one(refused: Callable[..., str], what: str) -> None:
    line = refused(val=tarred([*val_members()[:3], BAD[what]]))
    assert line.startswith("ILSVRC2012_img_val.tar: its member ")
    wanted = "wanted are ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00000008.JPEG"
    assert wanted in line or "refused" in line


@pytest.mark.parametrize("what", BAD)
def test_a_class_tar_that_is_not_the_official_one(refused: Callable[..., str], what: str) -> None:
    line = refused(train=tarred([("n01440764.tar", b""), BAD[what]]))
    assert line.startswith("ILSVRC2012_img_train.tar: its member ")
    assert "wanted are n01440764.tar to n04254120.tar, as meta.mat has them" in line or "refused" in line


def test_a_name_that_stands_in_an_extended_header(refused: Callable[..., str], official: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("n01440764_1.JPEG")
        info.pax_headers = {"path": "../../escaped.JPEG"}
        tar.addfile(info)
    line = refused(train=with_class(official, "n01440764", out.getvalue()), written=len(VAL))
    assert "its member '../../escaped.JPEG' does not belong there" in line


def test_a_devkit_with_a_link_or_with_gigabytes(refused: Callable[..., str], tmp_path: Path) -> None:
    name = "ILSVRC2012_devkit_t12/data/meta.mat"
    info = tarfile.TarInfo(name)
    info.size = 1 << 33
    line = refused(devkit=gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
    assert line == f"ILSVRC2012_devkit_t12.tar.gz: its member {name} has {1 << 33} bytes: refused"
    (tmp_path / "archives").rename(tmp_path / "before")
    line = refused(devkit=tarred([special(name, tarfile.SYMTYPE, "/etc/passwd")], "w:gz"))
    assert line.startswith(f"ILSVRC2012_devkit_t12.tar.gz: its member '{name}' is a symbolic link")


@pytest.mark.parametrize(
    ("devkit_of", "line"),
    [
        (lambda: devkit(mat=b"no matrix"), "meta.mat: is not that of ILSVRC-2012: "),
        (lambda: devkit(mat=b""), "meta.mat: is not that of ILSVRC-2012: "),
        (lambda: devkit(mat=meta(ids=IDS | {"n01440764": 7})), "meta.mat: its leaves are not numbered 1, 2, 3, …"),
        (lambda: devkit(mat=meta(pictures=PICTURES | {"n01440764": 0})), "of 0 pictures is none of ImageNet"),
        (lambda: devkit(answers=[1, 5]), "ground_truth.txt, line 2: '5' is no class of meta.mat"),
        (lambda: tarred([("readme.txt", b"x")], "w:gz"), "it is not the devkit of ILSVRC-2012, tasks 1 and 2"),
        (lambda: tarred([("readme.txt", b"x")]), "is no tar file, or cut off"),
        (lambda: devkit()[:-400], "ILSVRC2012_devkit_t12.tar.gz: "),
        (lambda: b"", "is no tar file, or cut off; download it again"),
    ],
)
def test_a_wrong_devkit(refused: Callable[..., str], devkit_of: Callable[[], bytes], line: str) -> None:
    assert line in refused(devkit=devkit_of())


def test_wrong_and_broken_archives(refused: Callable[..., str], official: dict[str, bytes], tmp_path: Path) -> None:
    train, val = official["ILSVRC2012_img_train.tar"], official["ILSVRC2012_img_val.tar"]
    one_class_less = tarred([(f"{w}.tar", tarred(train_members(w))) for w in WNIDS if w != "n02012849"])
    twice = tarred([(f"{w}.tar", b"") for w in [*WNIDS, "n01440764"]])
    cases = [
        ({"train": val}, "ILSVRC2012_img_train.tar: its member 'ILSVRC2012_val_00000001.JPEG' does not belong there"),
        ({"val": train}, "ILSVRC2012_img_val.tar: its member 'n01440764.tar' does not belong there"),
        ({"train": b"<html>"}, "ILSVRC2012_img_train.tar: is no tar file, or cut off; download it again"),
        ({"val": b""}, "ILSVRC2012_img_val.tar: is no tar file, or cut off; download it again"),
        ({"train": train[: len(train) // 2]}, "ILSVRC2012_img_train.tar: is cut off or damaged: unexpected end of"),
        ({"train": one_class_less}, "ILSVRC2012_img_train.tar: lacks n02012849.tar and 0 more; download it again"),
        ({"train": twice}, "ILSVRC2012_img_train.tar: its member 'n01440764.tar' is there twice"),
        ({"val": val[: len(val) // 2]}, "ILSVRC2012_img_val.tar: "),
        ({"val": tarred(val_members()[:-1])}, "ILSVRC2012_img_val.tar: has 7 pictures, but the devkit says 8"),
        ({"val": tarred([*val_members(), val_members()[0]])}, "'ILSVRC2012_val_00000001.JPEG' is there twice"),
    ]
    for changed, line in cases:
        assert line in refused(**changed), changed
        for path in (tmp_path / "archives").iterdir():
            path.unlink()
        (tmp_path / "archives").rmdir()


def test_a_class_that_is_cut_off_or_lacks_pictures(refused: Callable[..., str], official: dict[str, bytes]) -> None:
    members = train_members("n02012849")
    few = with_class(official, "n02012849", tarred(members[:-1]))
    line = refused(train=few, written=len(VAL) + PICTURES["n01440764"])
    assert line == "ILSVRC2012_img_train.tar: n02012849.tar: has 4 pictures, but the devkit says 5"


def test_a_class_tar_that_is_none(refused: Callable[..., str], official: dict[str, bytes]) -> None:
    line = refused(train=with_class(official, "n01440764", b"<html>" * 200), written=len(VAL))
    assert line == "ILSVRC2012_img_train.tar: n01440764.tar: is no tar file, or cut off; download it again"


def test_a_missing_archive_and_no_room(
    refused: Callable[..., str], script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused()
    assert re.fullmatch(r"ROOT: 0\.\d GB are to be written, but 0\.0 GB of disk are free", line)
    (tmp_path / "archives" / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(
        ValueError, match=r"ILSVRC2012_img_val\.tar: is not there; wanted are ILSVRC2012_img_train\.tar"
    ):
        script.prepare(tmp_path / "archives", tmp_path / "imagenet")
    assert not (tmp_path / "imagenet").exists()


def test_folders_that_are_there_and_not_whole_are_left_to_the_user(
    script: ModuleType, official: dict[str, bytes], tmp_path: Path
) -> None:
    archives, root = lay(tmp_path / "archives", official), tmp_path / "imagenet"
    script.prepare(archives, root)
    one = next((root / "train" / "n02012849").iterdir())
    one.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{one}: is empty; remove {one.parent} and run it again$"):
        script.prepare(archives, root)
    one.unlink()
    with pytest.raises(ValueError, match=f"^{one.parent}: has 4 pictures, but the devkit says 5; move it away"):
        script.prepare(archives, root)


def test_two_at_once(script: ModuleType, official: dict[str, bytes], tmp_path: Path) -> None:
    archives, root = lay(tmp_path / "archives", official), tmp_path / "imagenet"
    with (
        script.alone(root),
        pytest.raises(ValueError, match=r"imagenet: another process prepares it; wait for it, or stop it$"),
    ):
        script.prepare(archives, root)


def test_md5(
    refused: Callable[..., str],
    script: ModuleType,
    official: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import hashlib

    line = refused("--md5")
    found = hashlib.md5(official["ILSVRC2012_devkit_t12.tar.gz"]).hexdigest()
    official_sum = "fa75699e90414af021442c21a62c3abf"
    assert line == f"ILSVRC2012_devkit_t12.tar.gz: its MD5 is {found}, not {official_sum}: download it again"
    sums = {name: hashlib.md5(data).hexdigest() for name, data in official.items()}
    monkeypatch.setattr(script, "MD5", sums)
    script.main([str(tmp_path / "archives"), str(tmp_path / "imagenet"), "--md5"])
    assert below(tmp_path / "imagenet") == expected(official)


# The page


PAGE = Path(__file__).parents[1] / "docs" / "imagenet.md"


def commands() -> list[list[str]]:
    """The words behind `spp` of every command in a block of the page."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s#.*", "", line) for block in blocks for line in block.splitlines()]
    return [line.split("spp ", 1)[1].split() for line in lines if re.match(r"(srun .*)?spp ", line)]


@pytest.mark.slow
@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_page_is_one(words: list[str]) -> None:
    verb, *rest = words
    check(verb, [word for word in rest if not word.endswith(".jpg")])  # raises where a key or a choice is none


def test_the_page_has_the_sums_and_each_row_of_table_2(script: ModuleType) -> None:
    text, run = PAGE.read_text(encoding="utf-8"), {word for words in commands() for word in words}
    assert all(f"`{name}` |" in text and total in text for name, total in script.MD5.items())
    for name in ("table2a_no_spp", "table2b_single_size", "table2c_multi_size", "text_30_bins", "text_uniform_size"):
        header = (conf_folder() / "experiment" / f"{name}.yaml").read_text()
        expected = re.findall(r"\d\d\.\d\d", header.partition("Expected")[2].partition("(")[0])
        (row,) = re.findall(rf"^\| .* \| `experiment={name}` \|$", text, re.MULTILINE)
        assert expected and re.findall(r"\d\d\.\d\d", row) == expected
        assert f"experiment={name}" in run
    views = {path.stem for path in (conf_folder() / "views").glob("*.yaml")} - {
        "ten_crop_maps",
        "multi_scale_pixels",
        "warp",
    }
    assert {f"views={name}" for name in views} <= run


# From the archives to predictions


@pytest.fixture
def prepared(script: ModuleType, official: dict[str, bytes], tmp_path: Path) -> Path:
    script.prepare(lay(tmp_path / "archives", official), tmp_path / "imagenet")
    return tmp_path / "imagenet"


@pytest.mark.parametrize(
    "words",
    [
        ["data.region=64", "data.resize=73", "model.width=0.0625", "model.fc=[16,16]"],
        ["model.width=0.25", "model.fc=[64,64]"],  # at 180 and 224 px
    ],
    ids=["64 px", "224 px"],
)
@pytest.mark.slow
def test_from_the_archives_to_predictions(spp: Spp, prepared: Path, tmp_path: Path, words: list[str]) -> None:
    data = ["data=imagenet", f"data.root={prepared}", "data.layout.val_per_class=1"]
    answer = spp("check", *data)
    assert answer.code == 0, answer.out + answer.err
    assert "32 of 4 classes" in answer.out
    words = [
        *("experiment=table2c_multi_size", "model=zf5", *data, "recipe=paper", *words, "data.batch_size=8"),
        *("data.num_workers=0", "trainer=cpu", "trainer.max_epochs=2", "logger=null"),
    ]
    answer = spp("plan", *words, "measure=0.01", "views=ten_crop")
    assert answer.code == 0 and "20 train, 4 val, 8 test" in answer.out, answer.out + answer.err
    answer = spp("train", *words)
    assert answer.code == 0, answer.err
    (run,) = (tmp_path / "runs" / "imagenet-zf5").iterdir()
    answer = spp("evaluate", f"run={run}", "views=ten_crop")
    assert answer.code == 0 and answer.out.startswith("test error of 8 images (ten_crop, "), answer.err
    (folder,) = (run / "evaluations").iterdir()
    assert "\nn01440764 tench,2," in (folder / "per_class.csv").read_text()
    pictures = sorted((prepared / "val").rglob("*.JPEG"))
    answer = spp("predict", f"run={run}", "views=ten_crop", "format=jsonl", *pictures)
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    names = {"n01440764 tench", "n02012849 crane", "n03126707 crane", "n04254120 soap dispenser"}
    assert len(rows) == 8 and all(set(row["top"]) == names for row in rows)
