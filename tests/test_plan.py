"""`spp plan`: its numbers by hand, and that nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Spp

from spp_cls.cost import cost
from spp_cls.models import sppnet


def rows(out: str, header: str) -> list[list[str]]:
    """The lines of the table below `header`, in words."""
    lines = iter(out.splitlines())
    next(line for line in lines if line.split()[: len(header.split())] == header.split())
    found = []
    for line in lines:
        if not line.startswith("  "):
            break
        found.append(line.split())
    return found


def test_epochs_sizes_and_steps_by_hand(spp: Spp, small: list[str], tmp_path: Path) -> None:
    # 36 pictures in batches of 8: 4 steps an epoch, 4 pictures left over.
    answer = spp("plan", *small, "trainer.max_epochs=3")
    assert answer.code == 0, answer.err
    assert rows(answer.out, "epochs size px") == [["0", "26", "4"], ["1", "32", "4"], ["2", "26", "4"], ["all", "12"]]
    assert "8 images a step = 8 at once × 1 devices × 1 accumulated; 4 of 36 left over in each epoch" in answer.out
    assert "54 pictures of 3 classes (36 train, 9 val, 9 test)" in answer.out
    assert "note: the last epoch trains at 26 px, not at 32" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_epochs_of_one_size_stand_in_one_line(spp: Spp, small: list[str]) -> None:
    words = ["sizes=single", "trainer.max_epochs=5", "trainer.accumulate_grad_batches=2", "trainer.devices=2"]
    answer = spp("plan", *small, *words)
    assert rows(answer.out, "epochs size px") == [["0–4", "32", "20"], ["all", "20"]]
    assert "8 images a step = 2 at once × 2 devices × 2 accumulated; 4 of 36 left over" in answer.out
    assert "note:" not in answer.out and "less than all at" not in answer.out


def test_many_epochs_are_shortened_and_the_last_is_shown(spp: Spp, small: list[str]) -> None:
    answer = spp("plan", *small, "trainer.max_epochs=20")
    found = rows(answer.out, "epochs size px")
    assert [row[0] for row in found] == [*map(str, range(8)), "…", "17", "18", "19", "all"]
    assert found[-2:] == [["19", "32", "4"], ["all", "80"]]
    assert "note:" not in answer.out


def test_costs_are_those_of_the_net(spp: Spp, small: list[str]) -> None:
    answer = spp("plan", *small)
    net = sppnet("tiny", 3, fc=(128,), dropout=0.2, width=0.25)
    costs = [cost(net, size) for size in (26, 32)]
    assert f"net: {costs[0].parameters:,} parameters" in answer.out
    found = rows(answer.out, "size px map")
    for row, each in zip(found, costs, strict=True):
        assert row[:2] == [str(each.size), "×".join(map(str, each.map_size))]
        assert float(row[2]) == pytest.approx(each.forward_flops / 1e9, abs=5e-4)
        assert float(row[3]) == pytest.approx(each.training_flops / 1e9, abs=5e-4)
        assert float(row[4]) == pytest.approx(each.training_bytes(8) / 1e9, abs=5e-3)
    small_, large = (each.training_flops for each in costs)
    saved = re.search(r"PFLOP in all, (\d+)% less than all at 32 px", answer.out)
    assert saved and int(saved[1]) == round(100 * (1 - (small_ + large) / (2 * large)))


def test_it_refuses_what_training_would(spp: Spp, small: list[str], tmp_path: Path) -> None:
    for word, line in (
        ("data.batch_size=64", "data.batch_size=64 is more than the 36 training images: use less"),
        ("sizes.sizes=[1,32]", "the net does not take images of 1 px"),
    ):
        answer = spp("plan", *small, word)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert line in answer.err
    assert list(tmp_path.iterdir()) == []
