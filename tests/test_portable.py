"""One file for every size: what runtimes of others say of a net is what the net says, or there is no file."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from spp_cls import portable
from spp_cls.models import SpatialPyramidPool2d, SPPNet, sppnet
from spp_cls.portable import Agreement, clouds, compare, load, shapes_to_try, write

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


def tiny(**options: Any) -> SPPNet:
    return sppnet("tiny", 5, fc=(64,), width=0.25, **options).eval()


def about(net: SPPNet, **more: Any) -> dict[str, Any]:
    return {"mean": MEAN, "std": STD, "smallest_size": net.smallest_size(), "largest_size": 300, **more}


def by_hand(net: nn.Module, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        logits: Tensor = net((pixels.float() - mean) / std)
    return logits


def assert_equal_at(net: nn.Module, program: portable.Program, shapes: list[tuple[int, int, int]]) -> None:
    pixels = [clouds(shape, seed) for seed, shape in enumerate(shapes)]
    expected = [by_hand(net, each) for each in pixels]
    largest = max(logits.abs().max() for logits in expected)
    for shape, each, right in zip(shapes, pixels, expected, strict=True):
        with torch.no_grad():
            logits, probabilities = program(each)
        assert (logits - right).abs().max() <= 1e-5 * largest, shape
        torch.testing.assert_close(probabilities, right.softmax(-1), rtol=1e-5, atol=1e-6)


# What is compared


@pytest.mark.parametrize("limits", [(1, 2048), (17, 2048), (300, 400)])
def test_the_shapes_are_within_the_limits_and_reach_them(limits: tuple[int, int]) -> None:
    smallest, largest = limits
    shapes = shapes_to_try(smallest, largest)
    assert len(shapes) == 50 and shapes == shapes_to_try(smallest, largest) != shapes_to_try(*limits, seed=1)
    assert shapes[:3] == [(1, smallest, smallest), (2, smallest, largest), (3, largest, smallest)]
    assert {batch for batch, *_ in shapes} == {1, 2, 3}
    assert all(smallest <= side <= largest for _, *sides in shapes for side in sides)
    assert any(height > width for _, height, width in shapes) and any(height < width for _, height, width in shapes)
    assert all(b * h * w <= 640 * 480 for b, h, w in shapes[3:]) or smallest == 300
    assert all(min(sides) == smallest for b, *sides in shapes[3:] if b * sides[0] * sides[1] > 640 * 480)


def test_bins_of_clouds_have_maxima_of_their_own() -> None:
    pixels = clouds((2, 120, 160), seed=3)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 120, 160)
    maxima = SpatialPyramidPool2d([4])(pixels.float()).view(6, 16)
    assert min(len(row.unique()) for row in maxima) >= 8


def program_of(logits: Tensor, probabilities: Tensor | None = None) -> portable.Program:
    return lambda pixels: (logits, logits.softmax(-1) if probabilities is None else probabilities)


def test_the_difference_is_a_share_of_the_largest_logit_of_all_shapes() -> None:
    def net(pixels: Tensor) -> Tensor:
        return torch.tensor([[1.0, -8.0]]) if pixels.shape[2] == 20 else torch.tensor([[1.0, 2.0]])

    shapes = [(1, 10, 11), (1, 20, 12)]
    assert compare(net, program_of(torch.tensor([[1.0, 2.0]])), shapes) == Agreement(10 / 8, (1, 20, 12))
    assert compare(net, program_of(torch.tensor([[1.0, 4.0]])), shapes[:1]) == Agreement(2 / 2, (1, 10, 11))
    wrong = program_of(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.5]]))
    found = compare(net, wrong, shapes[:1])
    assert found.difference == pytest.approx(1 / (1 + np.exp(-1)) - 0.5)


def test_what_is_no_number_is_the_worst() -> None:
    def net(pixels: Tensor) -> Tensor:
        return torch.tensor([[1.0, 2.0]])

    def program(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tensor([[1.0, torch.nan if pixels.shape[2] == 20 else 3.0]])
        return logits, logits.softmax(-1)

    found = compare(net, program, [(1, 10, 11), (1, 20, 12), (1, 30, 13)])
    assert found.worst == (1, 20, 12) and np.isnan(found.difference)
    assert np.isnan(compare(lambda pixels: torch.zeros(1, 2), program_of(torch.zeros(1, 2)), [(1, 9, 9)]).difference)


# The formats


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "shapes_to_try", lambda *limits: shapes_to_try(*limits, number=8))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with averages and a norm, by torch.export."""
    net, path = tiny(pool="average", norm="across_channels"), tmp_path_factory.mktemp("written") / "deep" / "net.pt2"
    assert write(net, path, "torch", about(net, classes=["ä", "b"])).difference <= 1e-6
    assert [path.name for path in path.parent.iterdir()] == ["net.pt2"]
    return path


def test_torch_export_takes_every_size_between_the_limits(written: Path) -> None:
    net = tiny(pool="average", norm="across_channels")
    program, found = load(written, "torch")
    assert found == about(net, classes=["ä", "b"])
    assert_equal_at(net, program, shapes_to_try(net.smallest_size(), 300, number=40, seed=7))
    with pytest.raises(Exception, match="300"):
        program(clouds((1, 400, 100), 0))


@pytest.mark.slow
def test_the_pyramid_alone_through_onnx_at_every_size() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.max = SpatialPyramidPool2d((6, 4, 3, 2, 1))
            self.average = SpatialPyramidPool2d([3], "average")

        def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
            return self.max(maps), self.average(maps)

    both, free = Both(), {dim: torch.export.Dim.AUTO for dim in (0, 2, 3)}
    program = torch.export.export(both, (torch.randn(2, 3, 13, 15),), dynamic_shapes=(free,))
    with portable._quiet():
        made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["maps"])
    assert made is not None
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for h, w in [(h, w) for h in range(1, 13) for w in range(1, 13)] + [(1, 60), (37, 5), (30, 45), (64, 60)]:
        maps = torch.randn(1 + h % 3, 3, h, w, generator=torch.Generator().manual_seed(100 * h + w))
        largest, average = (torch.from_numpy(out) for out in session.run(None, {"maps": maps.numpy()}))
        assert torch.equal(largest, both.max(maps)), (h, w)
        torch.testing.assert_close(average, both.average(maps), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_pool_that_rounds_up_and_a_map_of_one_cell(tmp_path: Path, few_sizes: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3, stride=2)
            self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
            self.pyramid = SpatialPyramidPool2d([3, 1])
            self.head = nn.Linear(40, 2)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.pyramid(self.pool(self.convolution(images).relu())))
            return logits

    torch.manual_seed(0)
    net = Net().eval()
    said = {"mean": MEAN, "std": STD, "smallest_size": 5, "largest_size": 200}
    assert write(net, tmp_path / "net.pt2", "torch", said).difference < 1e-6
    assert_equal_at(net, load(tmp_path / "net.pt2", "torch")[0], [(1, 5, 5), (2, 5, 6), (1, 7, 90), (2, 33, 18)])
    with pytest.raises(ValueError, match=r"^the net takes no images of 3×3 px \(batch 1\) \(.+\)$"):
        write(net, tmp_path / "other.pt2", "torch", {**said, "smallest_size": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["max", pytest.param("average", marks=pytest.mark.long)])
def test_aotinductor_far_from_the_traced_size(tmp_path: Path, pool: str) -> None:
    net = tiny(pool=pool)
    said = about(net, classes=['"', "ä"])
    assert write(net, tmp_path / "net.aoti.pt2", "aoti", said).difference <= 1e-5
    program, found = load(tmp_path / "net.aoti.pt2", "aoti")
    assert found == said
    sizes = [(17, 17), (17, 300), (300, 17), (18, 33), (64, 64), (224, 224), (300, 233)]
    assert_equal_at(net, program, [(1 + i % 3, h, w) for i, (h, w) in enumerate(sizes)])
    assert_equal_at(net, program, shapes_to_try(17, 300, number=100, seed=5))


# What is refused


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Makes the writer of `torch` write given bytes."""

    def use(content: bytes) -> None:
        writers = {"torch": lambda program, path, said: path.write_bytes(content)}
        monkeypatch.setattr(portable, "_WRITERS", writers)
        monkeypatch.setattr(portable, "trace", lambda net, limits: None)

    return use


@pytest.mark.slow
def test_a_file_that_is_not_its_net_is_refused_and_what_was_there_stays(
    tmp_path: Path, copied: Callable[[bytes], None], few_sizes: None, written: Path
) -> None:
    net, other = (tiny(pool="average", norm="across_channels", seed=seed) for seed in (0, 1))
    good, path = written.read_bytes(), tmp_path / "net.pt2"
    path.write_bytes(good)
    copied(good)
    with pytest.raises(ValueError, match=r"net.pt2 is refused: at \d+×\d+ px \(batch [123]\) it differs .* 1e-05 is"):
        write(other, path, "torch", about(other))
    assert path.read_bytes() == good
    assert write(other, tmp_path / "loose.pt2", "torch", about(other), tolerance=1e9).difference > 1e-3
    copied(b"nothing")
    with pytest.raises(zipfile.BadZipFile):
        write(net, tmp_path / "broken.pt2", "torch", about(net))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loose.pt2", "net.pt2"]


def test_a_net_that_sees_its_size_as_a_number_is_refused(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) * int(images.shape[2] > 100) + images.amax((2, 3))

    said = {"mean": MEAN, "std": STD, "smallest_size": 8, "largest_size": 400}
    with pytest.raises(ValueError, match=r"(the file was made, but fails|is refused: )"):
        write(Net(), tmp_path / "net.pt2", "torch", said)

    class Bad(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) * images.mean().item() if images.mean() > 0 else images.amax((2, 3))

    with pytest.raises(ValueError, match=r"^format=torch: the net has no form for all sizes \(.+\)$"):
        write(Bad(), tmp_path / "net.pt2", "torch", said)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(
        ValueError, match=r'^format=onnx needs onnx, onnxscript, onnxruntime: pip install "spp_cls\[exp'
    ):
        portable.check_format("onnx")
    portable.check_format("torch")
    with pytest.raises(ValueError, match="^format=tf: use one of onnx, torch, aoti$"):
        portable.check_format("tf")

    def no_compiler() -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    with pytest.raises(ValueError, match=r"^format=aoti needs a C\+\+ compiler, and there is none"):
        portable.check_format("aoti")
