"""From the archives of ILSVRC-2012 to the folders that `data=imagenet` reads.

    python scripts/prepare_imagenet.py ARCHIVES ROOT
    spp check data=imagenet data.root=ROOT

ARCHIVES is a folder with the three official files, as they were downloaded from https://image-net.org:

    ILSVRC2012_img_train.tar        148 GB   1,281,167 pictures of 1000 classes, a tar of tars
    ILSVRC2012_img_val.tar          6.7 GB   50,000 pictures, which the paper tests on
    ILSVRC2012_devkit_t12.tar.gz    2.5 MB   the classes, and the answers to val

ROOT becomes

    ROOT/train/n01440764/n01440764_10026.JPEG …
    ROOT/val/n01440764/ILSVRC2012_val_00000293.JPEG …
    ROOT/LOC_synset_mapping.txt     n01440764 tench, Tinca tinca …

The archives are only read. A class is written beside and renamed when it is whole, so that the command can be killed at
any instant; typed again, it goes on with the first class that is not there. A member that the official archive does not
have at its place (another name, a link, a device) ends it, and is not written. All is counted at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {  # as on the page of the download, and in torchvision.datasets.imagenet
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
META = "ILSVRC2012_devkit_t12/data/meta.mat"
ANSWERS = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
NAMES = "LOC_synset_mapping.txt"  # as in Kaggle's download of the same pictures
WNID = re.compile(r"n[0-9]{8}")
CHUNK = 1 << 20  # bytes
LARGEST = 1 << 26  # bytes of a file of the devkit; meta.mat has less than a hundredth of it
LOST = 4096  # bytes of disk that a file takes beyond its own, at most
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class Devkit:
    """wnid → words, wnid → number of training pictures, name of a val picture → wnid."""

    words: dict[str, str]
    train: dict[str, int]
    val: dict[str, str]


@dataclass(frozen=True)
class Part:
    """A folder that is written whole or not at all: a class of train, or val.

    `place` gives the folder inside it of a picture by its name, None where there is no such picture; `wanted` says in
    words which there are, `pictures` how many, `size` how many bytes they take in the archive.
    """

    folder: Path
    place: Callable[[str], str | None]
    wanted: str
    pictures: int
    size: int


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", metavar="ARCHIVES", type=Path, help="the folder with the three official files")
    parser.add_argument("root", metavar="ROOT", type=Path, help="the folder to be made, of about 160 GB")
    parser.add_argument("--md5", action="store_true", help="first compare the files with their known MD5 sums")
    args = parser.parse_args(arguments)
    try:
        print(prepare(args.archives, args.root, args.md5))
    except (ValueError, OSError) as error:
        print(f"prepare_imagenet.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("prepare_imagenet.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


def prepare(archives: Path, root: Path, md5: bool = False) -> str:
    """Makes `root` from the files in `archives`, and says what is in it; ValueError names archive and member."""
    for name in MD5:
        if not (archives / name).is_file():
            raise ValueError(f"{archives / name}: is not there; wanted are {', '.join(MD5)} of https://image-net.org")
    if md5:
        check_md5(archives)
    devkit = read_devkit(archives / DEVKIT)
    with opened(archives / TRAIN) as outer, opened(archives / VAL) as pictures, alone(root):
        inner = class_tars(archives / TRAIN, outer, devkit)
        val = val_part(archives / VAL, root, devkit)
        train = {wnid: class_part(wnid, root, devkit, inner[wnid].size) for wnid in inner}
        every = [val, *train.values()]
        left = {part.folder: part for part in every if not is_whole(part)}
        check_room(root, sum(part.size + LOST * part.pictures for part in left.values()))
        total = sum(part.size for part in left.values())
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            if val.folder in left:
                bar.set_description("val")
                extract(pictures, str(archives / VAL), val, bar.update)
            for wnid, part in train.items():
                if part.folder in left:
                    bar.set_description(wnid)
                    with opened(archives / TRAIN, f"{wnid}.tar", outer.extractfile(inner[wnid])) as class_tar:
                        extract(class_tar, f"{archives / TRAIN}: {wnid}.tar", part, bar.update)
        write_names(root / NAMES, devkit)
        for part in every:
            if not is_whole(part):
                raise ValueError(f"{part.folder}: was there a moment ago; leave {root} alone and run it again")
    return (
        f"{root}: {sum(devkit.train.values()):,} pictures in train, {len(devkit.val):,} in val, of "
        f"{len(devkit.train):,} classes\nnext: spp check data=imagenet data.root={root}"
    )


def class_part(wnid: str, root: Path, devkit: Devkit, size: int) -> Part:
    name = re.compile(rf"{wnid}_[0-9]{{1,12}}\.JPEG")
    return Part(
        folder=root / "train" / wnid,
        place=lambda member: "" if name.fullmatch(member) else None,
        wanted=f"{wnid}_<number>.JPEG",
        pictures=devkit.train[wnid],
        size=size,
    )


def val_part(path: Path, root: Path, devkit: Devkit) -> Part:
    return Part(
        folder=root / "val",
        place=devkit.val.get,
        wanted=f"{val_name(1)} to {val_name(len(devkit.val))}",
        pictures=len(devkit.val),
        size=path.stat().st_size,
    )


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


# What is read


@contextlib.contextmanager
def opened(path: Path, inside: str = "", file: IO[bytes] | None = None, mode: str = "r:") -> Iterator[tarfile.TarFile]:
    """The tar at `path`, or in it the tar `file`, named `inside`; uncompressed, as the archives of pictures are."""
    with contextlib.ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(None if file else path, mode, file))  # type: ignore[call-overload]
        except (tarfile.TarError, EOFError) as error:
            what = f"{path}: {inside}" if inside else str(path)
            raise ValueError(f"{what}: is no tar file, or cut off; download it again") from error
        yield tar


def members(tar: tarfile.TarFile, archive: str) -> Iterator[tarfile.TarInfo]:
    """The headers of `tar`, one by one."""
    try:
        yield from tar
    except Exception as error:  # tarfile has many words for a header that is none
        raise ValueError(f"{archive}: is cut off or damaged: {one_line(error)}; download it again") from error


def plain(member: tarfile.TarInfo, archive: str) -> tarfile.TarInfo:
    """`member`, if it is a file and nothing else."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        kind = KINDS.get(member.type, "no plain file")
        raise ValueError(f"{archive}: its member {short(member.name)} is {kind}: refused, it is not the official file")
    return member


def refuse(member: tarfile.TarInfo, archive: str, wanted: str) -> ValueError:
    return ValueError(f"{archive}: its member {short(member.name)} does not belong there; wanted are {wanted}")


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: str) -> Iterator[bytes]:
    """The bytes of a plain `member`, all of them."""
    left = member.size
    try:
        file = tar.extractfile(member)
        assert file is not None
        while left and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk
    except (tarfile.TarError, EOFError, zlib.error):
        pass
    if left:
        raise ValueError(f"{archive}: its member {short(member.name)} is cut off; download it again")


def class_tars(path: Path, outer: tarfile.TarFile, devkit: Devkit) -> dict[str, tarfile.TarInfo]:
    """wnid → its tar in the archive of train; read from the headers alone, and each there once."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in members(outer, str(path)):
        wnid = plain(member, str(path)).name.removesuffix(".tar")
        if wnid not in devkit.train or member.name == wnid:
            raise refuse(member, str(path), f"{min(devkit.train)}.tar to {max(devkit.train)}.tar, as meta.mat has them")
        if wnid in found:
            raise ValueError(f"{path}: its member {short(member.name)} is there twice")
        found[wnid] = member
    lacking = sorted(set(devkit.train) - set(found))
    if lacking:
        raise ValueError(f"{path}: lacks {lacking[0]}.tar and {len(lacking) - 1} more; download it again")
    return found


def read_devkit(path: Path) -> Devkit:
    """Classes and answers of the devkit at `path`; the leaves of its tree of synsets are the classes."""
    found: dict[str, bytes] = {}
    try:
        with opened(path, mode="r:gz") as tar:
            for member in members(tar, str(path)):
                if member.name in (META, ANSWERS):
                    if plain(member, str(path)).size > LARGEST:
                        raise ValueError(f"{path}: its member {member.name} has {member.size} bytes: refused")
                    found[member.name] = b"".join(contents(tar, member, str(path)))
    except OSError as error:  # of gzip
        raise ValueError(f"{path}: {one_line(error)}; download it again") from error
    for name in (META, ANSWERS):
        if name not in found:
            raise ValueError(f"{path}: has no {name}; it is not the devkit of ILSVRC-2012, tasks 1 and 2")
    leaves = read_synsets(found[META], f"{path}: {META}")
    wnids = {number: wnid for number, (wnid, _, _) in leaves.items()}
    val: dict[str, str] = {}
    for line, text in enumerate(found[ANSWERS].split(), start=1):
        if not text.isdigit() or int(text) not in wnids:
            raise ValueError(f"{path}: {ANSWERS}, line {line}: {short(text.decode('latin-1'))} is no class of meta.mat")
        val[val_name(line)] = wnids[int(text)]
    return Devkit(
        words={wnid: words for wnid, words, _ in leaves.values()},
        train={wnid: number for wnid, _, number in leaves.values()},
        val=val,
    )


def read_synsets(meta: bytes, where: str) -> dict[int, tuple[str, str, int]]:
    """ILSVRC2012_ID → wnid, words and number of training pictures, of the synsets without children."""
    import numpy as np
    from scipy.io import loadmat

    leaves: dict[int, tuple[str, str, int]] = {}
    try:
        synsets: Any = np.atleast_1d(loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
        for synset in synsets:
            if int(synset["num_children"]) == 0:
                wnid, words = str(synset["WNID"]), " ".join(str(synset["words"]).split())
                leaves[int(synset["ILSVRC2012_ID"])] = wnid, words, int(synset["num_train_images"])
    except Exception as error:  # loadmat has many words for a file that is none
        raise ValueError(f"{where}: is not that of ILSVRC-2012: {one_line(error)}") from error
    wnids = {wnid for wnid, _, _ in leaves.values()}
    if sorted(leaves) != list(range(1, len(leaves) + 1)) or len(wnids) < len(leaves) or not leaves:
        raise ValueError(f"{where}: its leaves are not numbered 1, 2, 3, … or have a wnid twice")
    for wnid, words, number in leaves.values():
        if not WNID.fullmatch(wnid) or not words or number < 1:
            raise ValueError(
                f"{where}: the class {short(wnid)}, {short(words)}, of {number} pictures is none of ImageNet"
            )
    return leaves


def check_md5(archives: Path) -> None:
    """Raises ValueError where a file is not the official one, bit for bit."""
    total = sum((archives / name).stat().st_size for name in MD5)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="MD5") as bar:
        for name, expected in sorted(MD5.items(), key=lambda item: (archives / item[0]).stat().st_size):
            md5 = hashlib.md5(usedforsecurity=False)
            with open(archives / name, "rb") as file:
                while chunk := file.read(CHUNK):
                    md5.update(chunk)
                    bar.update(len(chunk))
            if md5.hexdigest() != expected:
                raise ValueError(f"{archives / name}: its MD5 is {md5.hexdigest()}, not {expected}: download it again")


# What is written


def extract(tar: tarfile.TarFile, archive: str, part: Part, progress: Callable[[int], object]) -> None:
    """Writes the pictures of `tar` beside `part.folder`, and gives them its name when all of them are there."""
    beside = part.folder.with_name(f".{part.folder.name}.part")  # a dot: the layout passes it over
    shutil.rmtree(beside, ignore_errors=True)
    written = 0
    try:
        for member in members(tar, archive):
            place = part.place(plain(member, archive).name)
            if place is None:
                raise refuse(member, archive, part.wanted)
            (beside / place).mkdir(parents=True, exist_ok=True)
            try:
                with open(beside / place / member.name, "xb") as file:
                    for chunk in contents(tar, member, archive):
                        file.write(chunk)
                        progress(len(chunk))
            except FileExistsError as error:
                raise ValueError(f"{archive}: its member {short(member.name)} is there twice") from error
            written += 1
        if written != part.pictures:
            raise ValueError(f"{archive}: has {written:,} pictures, but the devkit says {part.pictures:,}")
        os.rename(beside, part.folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):
            part.folder.parent.rmdir()  # if there is nothing in it


def is_whole(part: Part) -> bool:
    """Whether the folder is there, with all its pictures; raises ValueError where it is, without them."""
    if not part.folder.exists():
        return False
    found = 0
    for folder, _, files in os.walk(part.folder):
        for name in files:
            if name.endswith(".JPEG"):
                found += 1
                if not os.path.getsize(os.path.join(folder, name)):  # a power cut can leave names without bytes
                    raise ValueError(f"{os.path.join(folder, name)}: is empty; remove {part.folder} and run it again")
    if found != part.pictures:
        raise ValueError(
            f"{part.folder}: has {found:,} pictures, but the devkit says {part.pictures:,}; move it away, run it again"
        )
    return True


def write_names(path: Path, devkit: Devkit) -> None:
    """`wnid words` a line; what lies there already is left as it is."""
    if not path.exists():
        beside = path.with_name(f".{path.name}.part")
        beside.write_text("".join(f"{wnid} {devkit.words[wnid]}\n" for wnid in sorted(devkit.words)), encoding="utf-8")
        os.replace(beside, path)


def check_room(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ValueError(f"{root}: {needed / 1e9:.1f} GB are to be written, but {free / 1e9:.1f} GB of disk are free")


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One process at a time, in the folder `root`, which is removed again where nothing was written to it."""
    lock = root / ".prepare.lock"
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: is a file; wanted is a folder to be made")
    root.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{root}: another process prepares it; wait for it, or stop it") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            lock.unlink()  # as long as it is held: another process may take one that is there
        held.release()
        with contextlib.suppress(OSError):
            root.rmdir()


# In words


def short(name: str) -> str:
    """A name as one line of text, whatever is in it."""
    return ascii(name if len(name) <= 80 else f"{name[:80]}…")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
