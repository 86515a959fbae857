from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spp_cls import ranks
from spp_cls.ranks import Place, apart, largest, place, refuse_different, restarted, same_words

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def nobody_started_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Place(0, 1, 1, "nobody")),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Place(5, 8, 4, "torchrun")),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, Place(1, 2, 0, "Lightning")),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, Place(0, 1, 1, "nobody")),  # the rank 0 of these
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, Place(3, 4, 2, "SLURM")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, Place(0, 1, 1, "nobody")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "8"}, Place(1, 8, 8, "torchrun")),
    ],
)
def test_the_place_is_what_the_starter_says(
    env: dict[str, str], expected: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


def test_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert restarted()


def test_one_process_decides_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_words(["a=1"], lambda words: [*words, "b=2"]) == ["a=1", "b=2"]
    assert largest(3) == 3
    # A rank that Lightning started has the words of rank 0 already.
    monkeypatch.setattr(ranks, "follow_parent", lambda: None)
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert same_words(["a=1"], lambda words: 1 / 0) == ["a=1"]  # type: ignore[arg-type, return-value]


def two_ranks(code: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", code, rank]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


@pytest.mark.slow
def test_rank_0_decides_for_all_and_the_largest_number_is_everybodys() -> None:
    code = """if True:
        import os, sys
        from torch import distributed
        from spp_cls.ranks import largest, same_words

        print(*same_words(["name=" + sys.argv[1]], lambda words: [*words, "decided by " + sys.argv[1]]), sep="|")
        distributed.init_process_group("gloo")
        print(largest(int(sys.argv[1])), largest(5 - int(sys.argv[1])))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        try:
            same_words([], lambda words: int("no number"))
        except ValueError as error:
            print(error)
        distributed.destroy_process_group()
    """
    zero, one = ((rank.communicate(timeout=60), rank.returncode) for rank in two_ranks(code))
    said, code_of_zero = zero[0][0].splitlines(), zero[1]
    assert said[:2] == ["name=0|decided by 0", "1 5"] and said[2].startswith("invalid literal")
    assert code_of_zero == 0, zero[0][1]
    assert one[0][0].splitlines() == ["name=0|decided by 0|hydra.output_subdir=null", "1 5"]
    assert one[1] == 2  # and leaves it to rank 0 to say why


@pytest.mark.slow
def test_ranks_that_would_not_do_the_same_end_and_rank_0_says_in_what() -> None:
    code = """if True:
        import sys
        from torch import distributed
        from spp_cls.ranks import refuse_different

        distributed.init_process_group("gloo")
        refuse_different({"a": [1, 2], "b": None})
        print("same", flush=True)
        one = sys.argv[1] == "1"
        try:
            refuse_different({"a": 1, "optimizer.lr": 0.2 if one else 0.1, **({"new": "x"} if one else {})})
        except ValueError as error:
            print(error)
            sys.exit(2)
    """
    zero, one = ((rank.communicate(timeout=60), rank.returncode) for rank in two_ranks(code))
    assert zero[0][0].splitlines() == [
        "same",
        "the ranks differ, so that none begins: new: None (rank 0), x (rank 1); optimizer.lr: 0.1 (rank 0), 0.2 "
        "(rank 1); start all of them with the same settings, environment, code and pictures",
    ]
    assert (zero[1], one[1]) == (2, 2), (zero[0][1], one[0][1])
    assert one[0][0] == "same\n" and "Traceback" not in one[0][1]


def test_one_rank_alone_agrees_with_itself_and_ranks_are_named_by_their_values() -> None:
    refuse_different({"a": 1})
    ranks = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"b": "2", "a": "1"}]
    assert apart(ranks) == "b: 2 (rank 0 2), 3 (rank 1)"
    assert apart(ranks[::2]) == ""


def train_on_two(folder: Path, pictures: Path, started_by: str, *words: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each process of `spp train` that was started here."""
    settings = [
        *("data=folder", f"data.root={pictures}", "data.region=32", "data.resize=36", "data.batch_size=8"),
        *("data.num_workers=0", "model.width=0.25", "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_epochs=1"),
        *("test=false", "hydra.run.dir=run", *words),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SPP_CACHE": str(folder.with_name("cache"))}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": "2"}
    places = [{**own, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"} for rank in ("0", "1")]
    if started_by == "Lightning":
        settings, places = [*settings, "trainer.devices=2"], [{}]
    folder.mkdir()
    command = [sys.executable, "-m", "spp_cls", "train", *settings]
    children = [
        subprocess.Popen(command, cwd=folder, env={**env, **place}, stderr=subprocess.PIPE, text=True)
        for place in places
    ]
    return [(child.wait(timeout=120), child.communicate()[1]) for child in children]


@pytest.mark.slow
@pytest.mark.parametrize("started_by", ["torchrun", "Lightning"])
def test_a_run_whose_ranks_differ_makes_no_step_and_writes_nothing(
    tmp_path: Path, pictures: Path, started_by: str
) -> None:
    different = tmp_path / "different"
    ended = train_on_two(different, pictures, started_by, "optimizer.lr=0.1${oc.env:LOCAL_RANK,0}")
    line = "spp train: the ranks differ, so that none begins: optimizer.lr: 0.10 (rank 0), 0.11 (rank 1); start all of"
    assert [code for code, _ in ended] == [2] * len(ended), ended
    said = [each for each in ended[0][1].splitlines() if each.startswith("spp")]
    assert len(said) == 1 and said[0].startswith(line)
    assert "Traceback" not in "".join(said for _, said in ended)
    left = {str(path.relative_to(different)) for path in different.rglob("*") if path.is_file()}
    # Where Lightning starts the others, rank 0 has begun its run by then.
    assert not [name for name in left if "history" in name or "checkpoints" in name or "timing" in name]
    assert not left or started_by == "Lightning"

    same = train_on_two(tmp_path / "same", pictures, started_by, "optimizer.lr=0.01")
    assert [code for code, _ in same] == [0] * len(same), same
    assert len((tmp_path / "same" / "run" / "history.jsonl").read_text().splitlines()) == 5


def test_who_was_started_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    child = """if True:
        import time
        from spp_cls.ranks import follow_parent

        follow_parent(0.05)
        print("up", flush=True)
        time.sleep(60)
    """
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stderr is not None
    assert parent.stdout.readline() == "up\n"
    parent.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert parent.stdout.read() == ""  # that is, until the child has ended too, which holds it open
    assert "spp: rank 0: the process that started it is gone, so it ends" in parent.stderr.read()
    assert time.monotonic() - began < 30
    parent.wait()
    parent.stdout.close()
    parent.stderr.close()
