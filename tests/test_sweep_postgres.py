"""Four workers on a PostgreSQL of their own, which this test starts and stops; `make prove-postgres`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from socket import socket

import pytest
import sweep_worker
import test_sweep
from optuna.storages import RDBStorage
from sweep_worker import finished, wanted, worker

from spp_cls.study import Claims

pytestmark = pytest.mark.postgres


def program(name: str) -> str:
    """Debian keeps PostgreSQL's programs out of the path."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), "")
    if not found:
        pytest.fail(f"{name} is not installed: apt-get install postgresql")
    return str(Path(found).resolve())


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of an empty cluster on loopback, in a temporary folder."""
    pytest.importorskip("psycopg")
    as_root = os.geteuid() == 0  # whom PostgreSQL refuses
    someone = pwd.getpwnam("postgres" if as_root else pwd.getpwuid(os.geteuid()).pw_name)

    def run(*command: str) -> None:
        user = {"user": someone.pw_uid, "group": someone.pw_gid, "extra_groups": []} if as_root else {}
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, **user)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout + done.stderr

    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="spp_pg") as folder:
        if as_root:
            os.chown(folder, someone.pw_uid, someone.pw_gid)
        data = f"{folder}/data"
        run(program("initdb"), "-D", data, "-A", "trust", "-U", "spp", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run(program("pg_ctl"), "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://spp@127.0.0.1:{port}/postgres"
        finally:
            run(program("pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for module, name in ((sweep_worker.jobs, "COMMAND"), (sweep_worker.jobs, "LOOK"), (sweep_worker.study, "_PAUSE")):
        monkeypatch.setattr(module, name, getattr(module, name))
    sweep_worker.look_often()
    opened: list[RDBStorage] = []
    database = sweep_worker.study._database
    monkeypatch.setattr(sweep_worker.study, "_database", lambda *given: opened.append(database(*given)) or opened[-1])
    yield
    for storage in opened:  # psycopg minds a connection that is left open
        storage.remove_session()
        storage.engine.dispose()


def test_claims(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_sweep, "DATABASE", database)
    test_sweep.test_a_trial_is_held_by_one_worker_and_goes_to_one_other_when_that_is_silent(tmp_path)


def test_four_workers_without_a_shared_disk_of_which_one_is_killed(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = []
    for name in "abcd":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        workers.append(worker("random", 24, database, "seconds=0.5"))
    monkeypatch.chdir(tmp_path / "a")
    test_sweep.wait_for(lambda: len(test_sweep.log("begins")) >= 2)
    time.sleep(0.1)
    workers[0].kill()
    workers[0].join()
    done = []
    for name, each in zip("bcd", workers[1:], strict=True):
        monkeypatch.chdir(tmp_path / name)
        done.append(finished(each))
    what = wanted(24, storage=database)
    trials = what.study.get_trials()[:24]
    assert [(trial.number, trial.state.name) for trial in trials] == [(i, "COMPLETE") for i in range(24)]
    ends = []
    for name in "abcd":
        monkeypatch.chdir(tmp_path / name)
        assert test_sweep.log("twice") == []
        ends += [line["words"]["key"] for line in test_sweep.log("ends")]
    assert sorted(ends) == [f"k{number:05d}" for number in range(24)]
    assert all(done) and sorted(sum(done, [])) == sorted(set(sum(done, [])))
    # What the killed one had begun was taken over.
    claims = Claims(what.study, tmp_path, 60.0)
    terms = [claims._owner(trial.number)[0] for trial in trials]
    assert 1 <= sum(term > 0 for term in terms) <= 4 and min(terms) == 0  # a slow machine may look dead, too
    # The draws are those of one worker alone.
    monkeypatch.chdir(tmp_path)
    alone = wanted(24, "seconds=0")
    test_sweep.go(alone, at_once=2)
    assert [trial.params for trial in alone.study.get_trials()] == [trial.params for trial in trials]
