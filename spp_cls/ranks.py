"""The processes of one run, its ranks: who started them, and how they come to do the same.

Lightning starts them on one machine (`trainer=ddp`: rank 0 starts the others, by its own command), torchrun and SLURM
on one or several. What depends on the moment (the run folder's name, which run `resume=auto` finds) rank 0 decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

PATIENCE = 10.0  # seconds that the others give rank 0 to say why all of them end
# What SLURM and torchrun say of a process of theirs; a run that it starts is no rank of it.
OF_A_RANK = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_RESTART_COUNT"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"),
)
_kept: list[Any] = []  # the store of a rank 0 that serves it, which ends with it


class Place(NamedTuple):
    """Which rank this process is, of how many, how many of them on this machine, and who started it."""

    rank: int
    ranks: int
    on_this_machine: int
    started_by: str  # torchrun, SLURM, Lightning (another rank 0), or nobody


def place() -> Place:
    """What the environment says of this process, before Lightning has started ranks of its own."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        ranks = int(env["WORLD_SIZE"])
        return Place(int(env["RANK"]), ranks, int(env.get("LOCAL_WORLD_SIZE", ranks)), "torchrun")
    if int(env.get("LOCAL_RANK", 0)) > 0 and "MASTER_PORT" in env:
        return Place(int(env["LOCAL_RANK"]), int(env.get("WORLD_SIZE", 2)), 0, "Lightning")
    # A shell inside an allocation has these as well, but is no task of srun; Lightning tells it by its name.
    if "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        ranks = int(env.get("SLURM_NTASKS", 1))
        return Place(int(env["SLURM_PROCID"]), ranks, ranks // int(env.get("SLURM_NNODES", 1)), "SLURM")
    return Place(0, 1, 1, "nobody")


def without_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """The environment `env` for a run that has ranks of its own, whoever started this process."""
    return {name: value for name, value in env.items() if name not in OF_A_RANK}


def restarted() -> bool:
    """Whether torchrun or SLURM started this job before, and starts it again."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def job() -> str | None:
    """What torchrun calls the job that this process belongs to, over all its starts; None where it has no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def same_words(words: list[str], decide: Callable[[list[str]], list[str]]) -> list[str]:
    """The words of a command after `decide`, which rank 0 asks, for all ranks.

    ValueError of `decide` ends rank 0; the others end with exit code 2 and leave it to that to say why.
    """
    here = place()
    if here.started_by == "Lightning":
        follow_parent()
        return words  # rank 0 has put there what it decided
    if here.ranks == 1:
        return decide(words)
    follow_parent()
    store = _store(here)
    key = f"spp_cls/words/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if here.rank:
        said = json.loads(store.get(key))
        if said is None:
            sys.exit(2)
        return [*said, "hydra.output_subdir=null"]  # one rank writes .hydra
    decided = None
    try:
        decided = decide(words)
        return decided
    finally:
        store.set(key, json.dumps(decided))


def _store(here: Place) -> Any:
    """What all ranks can read and rank 0 write; torch.distributed meets there later too."""
    from torch import distributed

    if here.started_by == "SLURM":
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            slurm.main_address,
            slurm.main_port,
            is_master=here.rank == 0,
            timeout=timedelta(minutes=10),
            wait_for_workers=False,
            multi_tenant=True,
        )
    else:
        store, _, _ = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
    _kept.append(store)
    return store


def follow_parent(every: float = 0.5) -> None:
    """End this process, at once and whatever it waits for, when the one that started it is gone."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        end(f"rank {place().rank}: the process that started it is gone, so it ends")

    threading.Thread(target=follow, name="spp_cls follow_parent", daemon=True).start()


def end(reason: str) -> None:
    """End this process from any thread, whatever its others are doing: no lock is waited for, nothing is saved."""
    os.write(2, f"spp: {reason}\n".encode())
    os._exit(1)


def largest(number: int) -> int:
    """The largest of the numbers that the ranks call this with, all of them at the same point."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return number
    tensor = torch.tensor(number)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=_hosts(distributed.group.WORLD))
    return int(tensor)


def refuse_different(facts: dict[str, Any]) -> None:
    """End every rank, with exit code 2, where `facts` are not the same on all; all call this at the same point.

    Rank 0 raises ValueError, which names the keys that differ and the values of the ranks; the others end with it.
    """
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return
    said = {key: json.dumps(value, default=str) for key, value in facts.items()}
    number = int(hashlib.sha256(json.dumps(sorted(said.items())).encode()).hexdigest()[:15], 16)
    if largest(number) == -largest(-number):
        return
    hosts = _hosts(distributed.group.WORLD)
    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, said, group=hosts)
    if distributed.get_rank():
        # Whoever started the ranks may end all of them when the first is gone: rank 0, when it has said why.
        with contextlib.suppress(RuntimeError):
            distributed.irecv(torch.zeros(1), src=0, group=hosts).wait(timedelta(seconds=PATIENCE))  # type: ignore
        if place().started_by != "Lightning":  # which has no mind to, and whose ranks follow their parent
            time.sleep(1)
        os._exit(2)
    _hosts.cache_clear()
    distributed.destroy_process_group()  # so the others know; and Python may not end amid its threads
    raise ValueError(
        f"the ranks differ, so that none begins: {apart(of_ranks)}; start all of them with the same settings, "
        "environment, code and pictures"
    )


def apart(of_ranks: Sequence[dict[str, str]]) -> str:
    """The keys in which `of_ranks` (a dict of each rank) differ, with the values and whose they are."""
    found = []
    for key in sorted({key for each in of_ranks for key in each}):
        whose: dict[str, list[str]] = {}
        for rank, each in enumerate(of_ranks):
            whose.setdefault(each.get(key, "null"), []).append(str(rank))
        if len(whose) > 1:
            values = (f"{json.loads(value)} (rank {' '.join(ranks)})" for value, ranks in whose.items())
            found.append(f"{key}: {', '.join(values)}")
    return "; ".join(found)


@lru_cache(maxsize=1)
def _hosts(world: Any) -> Any:
    """The ranks of `world` by way of their hosts, so that none has to wait for what its device is still computing."""
    from torch import distributed

    return distributed.new_group(backend="gloo")
