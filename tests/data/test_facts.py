from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spp_cls.data import facts as facts_module
from spp_cls.data.facts import ROTTEN, Facts, find_facts, look_at, read_journal

PATHS = [f"{number:02}.ppm" for number in range(10)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pictures without compression, so that any byte can be another; their widths are 1 to 10 px."""
    (tmp_path / "root").mkdir()
    for number, path in enumerate(PATHS):
        Image.new("RGB", (number + 1, 5), (number, 0, 0)).save(tmp_path / "root" / path)
    return tmp_path / "root"


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "CHUNK", 1)
    monkeypatch.setattr(facts_module, "HEADER_THREADS", 1)


def rot(file: Path, data: bytes | None = None) -> None:
    """Other contents, by default in the last byte, under the old length and date."""
    before = os.stat(file)
    old = file.read_bytes()
    new = old[:-1] + bytes([old[-1] ^ 1]) if data is None else data
    assert len(new) == len(old) and new != old
    file.write_bytes(new)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def known_of(root: Path, **options: bool) -> dict[str, Facts]:
    return dict(zip(PATHS, find_facts(root, PATHS, {}, **options)[0], strict=True))


# One file


def test_header_and_whole_say_the_same_and_whole_adds_the_hash(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6  # a quarter turn
    file = tmp_path / "a.jpg"
    Image.new("L", (30, 20)).save(file, exif=tags)
    stat = os.stat(file)
    header = Facts(stat.st_size, stat.st_mtime_ns, 20, 30, 6, "JPEG", "L")
    assert look_at(str(file), False) == header
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert look_at(str(file), True) == header._replace(checked=True, sha256=sha256)


def test_what_is_wrong_is_said_without_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "two  blanks.png"):
        Path(name).write_bytes(b"")
        for file in (name, f"./{name}", str(tmp_path / name)):
            for whole in (False, True):
                facts = look_at(file, whole)
                assert facts.reason == "is empty (0 bytes)" and facts.num_bytes == 0 and facts.checked is whole
    (tmp_path / "b.png").write_text("<html>")
    facts = look_at("./b.png", False)
    assert facts[:2] == (6, os.stat("b.png").st_mtime_ns)
    assert facts.reason == "not a picture of a known format: begins with b'<html>'"
    assert look_at("c.png", True) == Facts(0, 0, checked=True, reason="No such file or directory")


def test_only_the_whole_file_shows_that_its_end_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    assert look_at(str(file), False).reason == ""
    facts = look_at(str(file), True)
    assert facts.reason != "" and facts.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


# Which files are read


def test_facts_are_in_the_order_of_the_paths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "CHUNK", 3)  # the last one is short
    facts, read = find_facts(root, PATHS[::-1], {})
    assert [fact.width for fact in facts] == list(range(10, 0, -1)) and read == 10
    assert find_facts(root, [], {}) == ([], 0)


def test_what_is_known_and_unchanged_is_not_read(root: Path, read: list[str]) -> None:
    known = known_of(root)
    read.clear()
    assert find_facts(root, PATHS, known) == (list(known.values()), 0) and read == []
    Image.new("RGB", (50, 5)).save(root / PATHS[2])  # another length
    stat = os.stat(root / PATHS[5])
    os.utime(root / PATHS[5], ns=(stat.st_atime_ns, stat.st_mtime_ns - 1))  # another date, be it earlier
    (root / PATHS[7]).unlink()
    facts, number = find_facts(root, PATHS, known)
    assert sorted(read) == [PATHS[2], PATHS[5], PATHS[7]] and number == 3
    assert facts[2].width == 50 and facts[5].mtime_ns == stat.st_mtime_ns - 1 and facts[7].reason != ""


def test_whole_reads_what_only_the_header_is_known_of(root: Path, read: list[str]) -> None:
    known = known_of(root)
    for path in PATHS[:4]:
        known[path] = look_at(str(root / path), True)
    read.clear()
    facts, number = find_facts(root, PATHS, known, whole=True)
    assert sorted(read) == PATHS[4:] and number == 6
    assert all(fact.checked and len(fact.sha256) == 64 for fact in facts)
    read.clear()
    assert find_facts(root, PATHS, dict(zip(PATHS, facts, strict=True))) == (facts, 0)  # more than was asked for
    assert read == []


@pytest.mark.parametrize("whole", [False, True])
def test_a_bad_file_is_read_again(root: Path, read: list[str], whole: bool) -> None:
    (root / PATHS[3]).write_bytes(b"nothing")
    for checked in (False, True):
        known = known_of(root, whole=checked)
        assert [path for path in PATHS if known[path].reason] == [PATHS[3]]
        read.clear()
        find_facts(root, PATHS, known, whole=whole)
        expected = set(PATHS) if whole and not checked else {PATHS[3]}
        assert set(read) == expected


@pytest.mark.parametrize("whole", [False, True])
def test_a_pipe_is_not_waited_for(tmp_path: Path, whole: bool) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert look_at(str(tmp_path / "a.jpg"), whole).reason == "is no file, but a pipe or a device"


# Contents that change under an unchanged date


def test_again_finds_other_contents_under_the_same_length_and_date(root: Path) -> None:
    known = known_of(root, whole=True)
    kept = (root / PATHS[4]).read_bytes()
    rot(root / PATHS[4])
    assert look_at(str(root / PATHS[4]), True).reason == ""  # by itself it is a picture as good as any
    assert find_facts(root, PATHS, known, whole=True) == (list(known.values()), 0)  # whole believes the date
    facts, number = find_facts(root, PATHS, known, whole=True, again=True)
    assert number == 10
    assert facts[4] == known[PATHS[4]]._replace(reason=ROTTEN)  # what it should be is not forgotten
    assert facts[:4] + facts[5:] == [known[path] for path in PATHS if path != PATHS[4]]

    rotten = dict(zip(PATHS, facts, strict=True))
    assert find_facts(root, PATHS, rotten, whole=True)[0][4].reason == ROTTEN  # looked at once more, it still is
    assert find_facts(root, PATHS, rotten)[0][4].reason == ROTTEN
    rot(root / PATHS[4], kept)
    assert find_facts(root, PATHS, rotten, whole=True) == (list(known.values()), 1)


def test_other_contents_are_meant_if_the_date_is_another(root: Path) -> None:
    known = known_of(root, whole=True)
    rot(root / PATHS[4])
    known = dict(zip(PATHS, find_facts(root, PATHS, known, whole=True, again=True)[0], strict=True))
    stat = os.stat(root / PATHS[4])
    os.utime(root / PATHS[4], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    facts, number = find_facts(root, PATHS, known, whole=True)
    assert facts[4].reason == "" and number == 1
    assert facts[4].sha256 == hashlib.sha256((root / PATHS[4]).read_bytes()).hexdigest() != known[PATHS[4]].sha256


def test_contents_that_are_no_picture_any_more_keep_the_reader_s_reason(root: Path) -> None:
    known = known_of(root, whole=True)
    kept = (root / PATHS[4]).read_bytes()
    rot(root / PATHS[4], b"x" * len(kept))
    facts, _ = find_facts(root, PATHS, known, whole=True, again=True)
    assert facts[4].reason.startswith("not a picture") and facts[4].sha256 == known[PATHS[4]].sha256
    rot(root / PATHS[4], kept)
    assert find_facts(root, PATHS, dict(zip(PATHS, facts, strict=True)), whole=True, again=True)[0][4].reason == ""


def test_nothing_is_rotten_of_which_only_the_header_was_known(root: Path) -> None:
    known = known_of(root)
    rot(root / PATHS[4])
    facts, _ = find_facts(root, PATHS, known, whole=True, again=True)
    assert not any(fact.reason for fact in facts)


# The journal


def test_the_journal_holds_what_was_read_and_gives_it_back(tmp_path: Path) -> None:
    odd = [os.fsdecode(b"caf\xe9.ppm"), 'quote".ppm', "line\nend.ppm", "bild-\u00e4.ppm"]
    for number, path in enumerate(odd):
        Image.new("RGB", (number + 1, 2)).save(tmp_path / path)
    (tmp_path / "bad.ppm").write_bytes(b"\xff\xfe")
    journal = tmp_path / "journal"
    facts, _ = find_facts(tmp_path, [*odd, "bad.ppm"], {}, whole=True, journal=journal)
    assert read_journal(journal) == dict(zip([*odd, "bad.ppm"], facts, strict=True))
    size = journal.stat().st_size
    find_facts(tmp_path, [*odd, "bad.ppm"], dict(zip(odd, facts, strict=False)), journal=journal)
    assert journal.stat().st_size > size  # the bad one once more
    assert journal.read_bytes().count(b"\n") == 6
    assert read_journal(None) == read_journal(tmp_path / "none") == read_journal(tmp_path) == {}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_search_that_is_interrupted_goes_on_where_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], error: type[BaseException]
) -> None:
    noted = facts_module.look_at

    def interrupted(file: str, whole: bool) -> Facts:
        if file.endswith(PATHS[6]):
            raise error
        return noted(file, whole)

    journal = tmp_path / "journal"
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(facts_module, "look_at", interrupted)
        find_facts(root, PATHS, {}, journal=journal)
    found = read_journal(journal)
    assert set(PATHS[:6]) <= set(found) == set(read) and PATHS[6] not in found
    read.clear()
    facts, number = find_facts(root, PATHS, found, journal=journal)
    assert set(read) == set(PATHS) - set(found) and number == len(read)
    assert [fact.width for fact in facts] == list(range(1, 11))
    assert read_journal(journal) == dict(zip(PATHS, facts, strict=True))


def test_what_is_found_is_noted_though_one_before_it_takes_long(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_module, "CHUNK", 1)
    journal, others = tmp_path / "journal", threading.Event()

    def first_is_slow(file: str, whole: bool) -> Facts:
        if file.endswith(PATHS[0]):
            others.wait(10)
            raise KeyboardInterrupt
        if file.endswith(PATHS[9]):
            others.set()
        return look_at(file, whole)

    monkeypatch.setattr(facts_module, "look_at", first_is_slow)
    with pytest.raises(KeyboardInterrupt):
        find_facts(root, PATHS, {}, journal=journal)
    assert sorted(read_journal(journal)) == PATHS[1:]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_by_one")
def test_a_kill_loses_what_was_under_way_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    journal = tmp_path / "journal"

    def killed(file: str, whole: bool) -> Facts:
        if file.endswith(PATHS[6]):
            os.kill(os.getpid(), signal.SIGKILL)
        return look_at(file, whole)

    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "look_at", killed)
        process = multiprocessing.get_context("fork").Process(
            target=find_facts, args=(root, PATHS, {}), kwargs={"journal": journal}
        )
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = read_journal(journal)
    assert list(found) == PATHS[:6]
    find_facts(root, PATHS, found)
    assert sorted(read) == PATHS[6:]


def cut(data: bytes) -> bytes:
    return data[:-9]


def foreign(data: bytes) -> bytes:
    return b'5\n[]\n{}\nnull\n[["list"], 1, 2]\n["few"]\n\xff\n\n' + data


def too_long(data: bytes) -> bytes:
    return json.dumps(["00.ppm", *range(20)]).encode() + b"\n" + data


@pytest.mark.parametrize(("damage", "left"), [(cut, 9), (foreign, 10), (too_long, 10)])
def test_damaged_lines_of_a_journal_do_no_harm(
    root: Path, tmp_path: Path, damage: Callable[[bytes], bytes], left: int
) -> None:
    journal = tmp_path / "journal"
    known = dict(zip(PATHS, find_facts(root, PATHS, {}, journal=journal)[0], strict=True))
    journal.write_bytes(damage(journal.read_bytes()))
    found = read_journal(journal)
    assert len(found) == left and found.items() <= known.items()
    _, number = find_facts(root, PATHS, found, journal=journal)
    assert number == 10 - left
    assert read_journal(journal) == known  # what is added does not hang on a cut line


def test_a_journal_that_cannot_be_written_is_no_error(root: Path, tmp_path: Path) -> None:
    assert find_facts(root, PATHS, {}, journal=tmp_path / "no" / "folder")[1] == 10
    assert find_facts(root, PATHS, {}, journal=Path("/dev/full"))[1] == 10


# The bar


def test_the_bar_stands_on_stderr_only_if_it_takes_long(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_facts(root, PATHS, {})
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(facts_module, "DELAY", 0)
    find_facts(root, PATHS, {}, progress=False)
    assert capsys.readouterr() == ("", "")
    for whole, words in ((False, "reading sizes"), (True, "reading pictures")):
        find_facts(root, PATHS, {}, whole=whole)
        out, err = capsys.readouterr()
        assert out == "" and re.search(rf"{words}: 100%.* 10/10 .* pictures", err)
