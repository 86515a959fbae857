"""`spp plan`: its numbers by hand, that its verdict stands on measurements, and that nothing is written."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Spp
from lightning import Trainer

from spp_cls.cost import cost
from spp_cls.data import FullImage, MultiSizeDataModule, Views
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import single
from spp_cls.models import sppnet
from spp_cls.plan import images_at, remedies, validations, verdict
from spp_cls.verdict import Rates


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
    answer = spp("plan", *small, "trainer.max_epochs=3", "measure=0")
    assert answer.code == 0, answer.err
    assert rows(answer.out, "epochs size px") == [["0", "26", "4"], ["1", "32", "4"], ["2", "26", "4"], ["all", "12"]]
    assert "8 images a step = 8 at once × 1 devices × 1 accumulated; 4 of 36 left over in each epoch" in answer.out
    assert "verdict" not in answer.out and "images/s" not in answer.out
    assert "54 pictures of 3 classes (36 train, 9 val, 9 test)" in answer.out
    assert "note: the last epoch trains at 26 px, not at 32" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_epochs_of_one_size_stand_in_one_line(spp: Spp, small: list[str]) -> None:
    words = [
        "sizes=single",
        "trainer.max_epochs=5",
        "trainer.accumulate_grad_batches=2",
        "trainer.devices=2",
        "measure=0",
    ]
    answer = spp("plan", *small, *words)
    assert rows(answer.out, "epochs size px") == [["0–4", "32", "20"], ["all", "20"]]
    assert "8 images a step = 2 at once × 2 devices × 2 accumulated; 4 of 36 left over" in answer.out
    assert "note:" not in answer.out and "less than all at" not in answer.out


def test_many_epochs_are_shortened_and_the_last_is_shown(spp: Spp, small: list[str]) -> None:
    answer = spp("plan", *small, "trainer.max_epochs=20", "measure=0")
    found = rows(answer.out, "epochs size px")
    assert [row[0] for row in found] == [*map(str, range(8)), "…", "17", "18", "19", "all"]
    assert found[-2:] == [["19", "32", "4"], ["all", "80"]]
    assert "note:" not in answer.out


def test_costs_are_those_of_the_net(spp: Spp, small: list[str]) -> None:
    answer = spp("plan", *small, "measure=0")
    net = sppnet("tiny", 3, fc=(128,), dropout=0.2, width=0.25)
    costs = [cost(net, (size, size)) for size in (26, 32)]
    assert f"net: {costs[0].parameters:,} parameters" in answer.out
    found = rows(answer.out, "size px map")
    for row, each in zip(found, costs, strict=True):
        assert row[:2] == [str(each.shape[0]), "×".join(map(str, each.map_size))]
        assert float(row[2]) == pytest.approx(each.forward_flops / 1e9, abs=5e-4)
        assert float(row[3]) == pytest.approx(each.training_flops / 1e9, abs=5e-4)
        assert float(row[4]) == pytest.approx(each.training_bytes(8) / 1e9, abs=5e-3)
    small_, large = (each.training_flops for each in costs)
    saved = re.search(r"[PT]FLOP in all, (\d+)% less than all at 32 px", answer.out)
    assert saved and int(saved[1]) == round(100 * (1 - (small_ + large) / (2 * large)))


@pytest.mark.slow
def test_it_refuses_what_training_would(spp: Spp, small: list[str], tmp_path: Path) -> None:
    for word, line in (
        ("data.batch_size=64", "data.batch_size=64 is more than the 36 training images: use less"),
        ("sizes.sizes=[1,32]", "the net does not take images of 1 px"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0: a plan is of a number of epochs, at least 1"),
    ):
        answer = spp("plan", *small, word)
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert line in answer.err
    assert list(tmp_path.iterdir()) == []


def made(pictures: Path, sizes: Any, **more: Any) -> MultiSizeDataModule:
    datamodule = MultiSizeDataModule(str(pictures), folder, sizes, batch_size=8, region=32, resize=36, **more)
    datamodule.setup()
    return datamodule


def test_images_at_each_shape_by_hand(pictures: Path) -> None:
    def by_batch(seed: int, epoch: int, batch: int) -> int:
        return 26 if epoch == 0 or batch % 2 else 32

    # 36 pictures: 4 batches of 8, and one of 4 where the last is kept.
    for last, expected in (("drop", {(26, 26): 32 + 16, (32, 32): 16}), ("keep", {(26, 26): 36 + 16, (32, 32): 20})):
        module = made(pictures, by_batch, last_batch=last)
        assert images_at(module, module.planned_shapes(2)) == expected
    whole = made(pictures, FullImage(32, 8))
    index = whole.index
    assert index is not None
    at = images_at(whole, whole.planned_shapes(3))
    assert sum(at.values()) == 3 * 36
    assert set(at) == set(whole.planned_shapes(1)[0])


# The verdict


def test_the_verdict_stands_on_measurements_and_leaves_nothing(spp: Spp, small: list[str], tmp_path: Path) -> None:
    words = ["sizes.sizes=[20,24,26,28,32]", "trainer.max_epochs=5", "trainer.accumulate_grad_batches=2"]
    answer = spp("plan", *small, *words, "measure=0.02")
    assert answer.code == 0, answer.err
    assert "images/s, 4 at once on cpu\n" in answer.out
    found = rows(answer.out, "size px loader")
    assert [row[0] for row in found] == ["20", "24", "26", "32"]  # of five sizes, both ends and two between
    for _, *rates, limits in found:
        assert all(math.isfinite(float(rate)) and float(rate) > 0 for rate in rates)
        assert limits in ("loader", "net", "both")
    assert len({row[1] for row in found}) == 1  # regions are the same at all sizes
    assert answer.out.count("verdict: ") == 1
    assert re.search(r"\nmain memory in use, at most: \d+\.\d GB; \d+\.\d GB are free\n", answer.out)
    times = r"\nabout \d+ s in all: \d+ s of training, \d+ s of 5 validations, \d+ s of the test by center_crop\n"
    assert re.search(times, answer.out)
    assert list(tmp_path.iterdir()) == []


def test_whole_pictures_come_in_batches_of_their_own_shapes(spp: Spp, small: list[str]) -> None:
    answer = spp("plan", *small, "sizes=full_image", "sizes.multiple=8", "measure=0.02")
    assert answer.code == 0, answer.err
    (epochs, *_, steps), last = rows(answer.out, "epochs size px")
    assert (epochs, last) == ("0–1", ["all", steps])
    assert re.search(
        r"whole pictures a step, at most \d+ at once × 1 devices × 1 accumulated; 0 of 36 left", answer.out
    )
    sides = [tuple(map(int, row[0].split("×"))) for row in rows(answer.out, "size px map") if "×" in row[0]]
    assert sides and all(min(side) == 32 and max(side) % 8 == 0 for side in sides)
    assert "note:" not in answer.out and "less than all at" not in answer.out
    (row,) = rows(answer.out, "size px loader")
    assert row[0] == "whole" and all(float(rate) > 0 for rate in row[1:4])
    assert " on whole pictures; " in answer.out and "planned sizes save" not in answer.out


def test_a_plan_for_another_machine_stands_without_a_verdict(
    spp: Spp, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    answer = spp("plan", *small, "trainer.accelerator=gpu")
    assert answer.code == 0, answer.err
    assert len(rows(answer.out, "size px map")) == 2
    assert answer.out.splitlines()[-1].startswith("no verdict: trainer.accelerator=gpu: no GPU is to be seen here")


def test_the_hours_are_those_of_training_validation_and_test(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 72 images at 10 a second, 3 validations of 9 images at two sizes, one test of 9, on two devices.
    module = made(pictures, partial(single, size=32), val_sizes=[32, 26], views=Views("ten_crop"))
    trainer: Any = SimpleNamespace(
        world_size=2, num_devices=2, strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
    )
    asked = []

    def seconds_to_test(_: Any, __: Any, ___: Any, views: Views, split: str, seconds: float) -> float:
        asked.append((views, split, seconds))
        return 100.0 if split == "val" else 4.0

    monkeypatch.setattr("spp_cls.verdict.measure", lambda *_: [Rates((32, 32), 10, 10, 10)])
    monkeypatch.setattr("spp_cls.verdict.seconds_to_test", seconds_to_test)
    classifier: Any = SimpleNamespace(net=sppnet("tiny", 3, fc=(8,), width=0.25))
    said = verdict(classifier, module, trainer, {(32, 32): 72}, 0.5, validations=3, test=True)
    # 72 / 10 / 2 + 3 · 200 + 4
    assert said.splitlines()[-1] == (
        "about 10 min in all: 4 s of training, 10 min of 3 validations, 4 s of the test by ten_crop"
    )
    size_32, size_26 = Views("center_crop", 32), Views("center_crop", 26)
    assert asked == [(size_32, "val", 0.5), (size_26, "val", 0.5), (Views("ten_crop", 32), "test", 0.5)]
    trainer.strategy.root_device.type = "cuda"
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80_000_000_000))
    monkeypatch.setattr("spp_cls.callbacks.peak_memory", lambda _: 5_120_000_000)
    *_, memory, hours = verdict(classifier, module, trainer, {(32, 32): 72}, 0.5).splitlines()
    assert memory == "memory of the GPU in use, at most: 5.1 of 80.0 GB"
    assert hours == "about 4 s in all: 4 s of training"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10),
        ({"check_val_every_n_epoch": 3}, 3),
        ({"limit_val_batches": 0}, 0),
        ({"val_check_interval": 0.25}, 40),
        ({"val_check_interval": 4}, 20),  # of 8 batches
        ({"val_check_interval": 16, "check_val_every_n_epoch": None}, 5),
    ],
)
def test_how_often_a_trainer_validates(options: dict[str, Any], expected: int) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
    assert validations(trainer, 10, 8) == expected


def test_memory_of_the_gpu_stands_beside_what_is_needed(
    spp: Spp, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = cost(sppnet("tiny", 3, fc=(128,), dropout=0.2, width=0.25), (32, 32)).training_bytes(8)
    words = [*small, "measure=0", "trainer.accelerator=auto"]
    monkeypatch.setattr(
        "spp_cls.cost.gpu_memory", lambda accelerator: accelerator == "auto" and ("A100", 80_000_000_000)
    )
    answer = spp("plan", *words)
    assert answer.code == 0, answer.err
    line = f"memory of the GPU, A100: 80.0 GB; in float32 {needed / 1e9:.1f} GB are needed\n"
    assert line in answer.out and "note: in float32" not in answer.out
    assert "memory of the GPU" not in spp("plan", *small, "measure=0").out
    monkeypatch.setattr("spp_cls.cost.gpu_memory", lambda _: ("A1", needed - 1))
    note = "note: in float32 8 images of 32 px at once do not fit into memory: set trainer.accumulate_grad_batches=2"
    assert note in spp("plan", *words).out


def test_no_cache_is_made_for_a_verdict(pictures: Path, tmp_path: Path) -> None:
    module = made(pictures, partial(single, size=32), cache="raw", cache_folder=str(tmp_path / "cache"))
    nothing: Any = None
    with pytest.raises(RuntimeError, match=r"^the raw cache is not there yet; make it by spp cache data\.cache=raw"):
        verdict(nothing, module, nothing, {}, 1)
    assert list(tmp_path.iterdir()) == []


def test_remedies_are_those_that_are_left(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remedies_of(free: int, **more: Any) -> list[str]:
        monkeypatch.setattr("spp_cls.cost.available_memory", lambda: free)
        return remedies(made(pictures, partial(single, size=32), **more), SimpleNamespace(num_devices=2))  # type: ignore[arg-type]

    monkeypatch.setattr("os.cpu_count", lambda: 32)
    raw, jpeg, workers = "data.cache=raw (spp cache)", "data.cache=jpeg (spp cache)", "data.num_workers=16"
    much, little = 10**9, 10**5  # 36 pictures of 36 × 36 px and more are above 140 kB
    assert remedies_of(much) == [raw, workers]  # 8 at most by default
    assert remedies_of(little, num_workers=16) == [jpeg]
    assert remedies_of(much, num_workers="thread", cache="jpeg") == [raw, workers]
    assert remedies_of(little, num_workers=15, cache="jpeg") == [workers]
    assert remedies_of(much, cache="raw") == ["more cores or a faster disk"]
