from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spp_cls.data import device
from spp_cls.data.datamodule import IMAGENET_MEAN, IMAGENET_STD
from spp_cls.data.device import (
    EIGENVALUES,
    EIGENVECTORS,
    colour_shift,
    device_step,
    normalise,
    resize,
)
from spp_cls.data.plan import COLOUR, FLIP

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "flip": 0.0, "colour": 0.0}
ONE_SIGMA = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # the uniform whose ndtri is 1


def pictures(number: int, size: int) -> Tensor:
    """(B, 3, size, size) uint8: smooth, with edges and noise."""
    chance = np.random.default_rng(size)
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(2 * math.pi * (f * x + g * y)) for f, g in ((1, 2), (3, -1), (0.5, 0.7))]
    smooth = 127 + 90 * np.stack(waves) + 60 * (x + y > 1.1)
    noisy = smooth + chance.normal(0, 15, (number, 3, size, size))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def uniforms(number: int, value: float = 0.5) -> Tensor:
    return torch.full((number, 8), value)


def with_pillow(image: Tensor, size: int) -> Tensor:
    """(3, h, w) uint8 → (3, size, size) uint8."""
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def at_once(*arguments: Any, **options: Any) -> Tensor:
    """`device_step` by the route of a GPU."""
    with patch.object(device, "_image_by_image", device._at_once):
        return device_step(*arguments, **options)


def batched(images: Tensor, chance: Tensor, size: int, mean: list[float], std: list[float]) -> Tensor:
    """The route of a GPU, on this device."""
    return at_once(images, chance, size, mean=mean, std=std)


def test_the_same_size_is_only_normalised() -> None:
    images = pictures(3, 32)
    out = device_step(images, uniforms(3), (32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD, flip=0, colour=0)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), (images.double() - mean) / std, rtol=0, atol=1e-6)
    assert torch.equal(device_step(images, uniforms(3), (32, 32), **PLAIN), images.float())


@pytest.mark.parametrize(("region", "size"), [(224, 180), (32, 26), (32, 31), (224, 96)])
def test_resized_as_by_pillow_within_one_grey_level(region: int, size: int) -> None:
    images = pictures(2, region)
    expected = torch.stack([with_pillow(image, size) for image in images]).float()
    # Pillow rounds twice, once a direction; in float32 the last bits come on top.
    for out in (device_step(images, uniforms(2), (size, size), **PLAIN), resize(images.float(), (size, size))):
        assert out.shape == (2, 3, size, size)
        assert (out - expected).abs().max() <= 1 + 1e-3
        assert (out - expected).mean().abs() < 0.1


@pytest.mark.parametrize("size", [224, 180])
def test_both_routes_agree_within_one_grey_level(size: int) -> None:
    images, chance = pictures(4, 224), torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    mean, std = [120.0, 110.0, 100.0], [50.0, 60.0, 70.0]
    one_by_one = device_step(images, chance, (size, size), mean=mean, std=std)
    at_once = batched(images, chance, size, mean, std)
    grey_levels = (one_by_one - at_once) * torch.tensor(std)[:, None, None]
    assert grey_levels.abs().max() <= (1.001 if size < 224 else 0.001)


def test_mirrored_where_the_uniform_is_below_flip_and_nowhere_else() -> None:
    images, chance = pictures(4, 16), uniforms(4)
    chance[:, FLIP] = torch.tensor([0.0, 0.29, 0.3, 0.99])
    for out in (
        device_step(images, chance, (16, 16), **{**PLAIN, "flip": 0.3}),
        at_once(images, chance, 16, **{**PLAIN, "flip": 0.3}),
    ):
        assert torch.equal(out[:2], images[:2].flip(3).float())
        assert torch.equal(out[2:], images[2:].float())


def test_flip_is_a_share() -> None:
    chance = uniforms(4)
    chance[:, FLIP] = torch.tensor([0.0, 0.5, 0.9, 1 - 2**-24])
    images = pictures(4, 16)
    assert torch.equal(device_step(images, chance, (16, 16), **{**PLAIN, "flip": 1.0}), images.flip(3).float())
    assert torch.equal(device_step(images, chance, (16, 16), **{**PLAIN, "flip": 0.0}), images.float())


@pytest.mark.parametrize("component", [0, 1, 2])
def test_one_sigma_of_a_component_by_hand(component: int) -> None:
    chance = uniforms(1)  # ndtri(1/2) = 0
    chance[0, COLOUR.start + component] = ONE_SIGMA
    expected = [EIGENVALUES[component] * 0.1 * 255 * EIGENVECTORS[channel][component] for channel in range(3)]
    torch.testing.assert_close(colour_shift(chance, 0.1)[0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_one_sigma_is_five_and_a_half_grey_levels_along_the_first_component() -> None:
    chance = uniforms(1)
    chance[0, COLOUR.start] = ONE_SIGMA
    shift = colour_shift(chance, 0.1)[0]
    assert float(shift.norm()) == pytest.approx(5.546, abs=0.01)  # 0.2175 × 0.1 × 255
    assert torch.allclose(shift, torch.tensor([-3.147, -3.221, -3.237]), atol=0.01)  # nearly grey


def test_components_are_orthonormal() -> None:
    vectors = torch.tensor(EIGENVECTORS)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), rtol=0, atol=2e-3)


def test_colour_shifts_have_mean_zero_and_the_published_spread() -> None:
    chance = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0))
    shifts = colour_shift(chance, 0.1) @ torch.tensor(EIGENVECTORS)  # along the components
    sigma = torch.tensor(EIGENVALUES) * 25.5
    assert ((shifts.mean(0) / sigma).abs() < 5 / math.sqrt(20_000)).all()
    torch.testing.assert_close(shifts.std(0) / sigma, torch.ones(3), rtol=0, atol=0.03)


def test_colour_shift_is_finite_at_both_ends() -> None:
    ends = torch.cat([uniforms(1, 0.0), uniforms(1, 1 - 2**-24)])
    shifts = colour_shift(ends, 0.1)
    assert shifts.isfinite().all()
    torch.testing.assert_close(shifts[0], -shifts[1], rtol=0.02, atol=0.02)


def test_each_image_gets_the_shift_of_its_own_uniforms() -> None:
    images, chance = pictures(3, 8), torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    shifts = colour_shift(chance, 0.1)
    assert shifts[0].ne(shifts[1]).all()
    for out in (
        device_step(images, chance, (8, 8), **{**PLAIN, "colour": 0.1}),
        at_once(images, chance, 8, **{**PLAIN, "colour": 0.1}),
    ):
        expected = images + shifts[:, :, None, None]
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


def test_colour_is_in_grey_levels_whatever_the_scale() -> None:
    images, chance = pictures(2, 8), torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    out = device_step(images, chance, (8, 8), mean=IMAGENET_MEAN, std=IMAGENET_STD, flip=0, colour=0.1)
    plain = normalise(images.float() + colour_shift(chance, 0.1)[:, :, None, None], IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, 26])
def test_the_output_is_channels_last(size: int) -> None:
    out = device_step(pictures(2, 32), uniforms(2), (size, size), **PLAIN)
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    assert out.stride() == (3 * size * size, 1, 3 * size, 3)


def test_the_input_stays_as_it_is() -> None:
    images = pictures(2, 32)
    before = images.clone()
    device_step(images, uniforms(2, 0.1), (26, 26), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert torch.equal(images, before)


def test_normalise_takes_views_too() -> None:
    views = torch.stack([pictures(5, 8), pictures(5, 8)])  # (B, V, 3, h, w)
    out = normalise(views, IMAGENET_MEAN, IMAGENET_STD)
    for i, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        torch.testing.assert_close(out[:, :, i], (views[:, :, i].float() - mean) / std, rtol=0, atol=1e-5)


# A mean image


def mean_image(height: int, width: int) -> Tensor:
    """(3, height, width): a slope in each channel, along another direction."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([100 + 50 * x, 120 - 30 * y, 90 + 20 * x * y])


@pytest.mark.parametrize("size", [32, 26])
def test_a_mean_image_is_warped_to_the_size_and_subtracted_after_mirroring(size: int) -> None:
    images, chance = pictures(3, 32), uniforms(3)
    chance[:, FLIP] = torch.tensor([0.1, 0.9, 0.1])
    mean, std = mean_image(32, 32), [50.0, 60.0, 70.0]
    pixels = resize(images, (size, size)).float()
    pixels[[0, 2]] = pixels[[0, 2]].flip(3)
    expected = (pixels - resize(mean[None], (size, size))) / torch.tensor(std)[:, None, None]
    options: dict[str, Any] = {"mean": mean, "std": std, "flip": 0.5, "colour": 0.0}
    torch.testing.assert_close(device_step(images, chance, (size, size), **options), expected, rtol=0, atol=1e-5)
    # On a GPU no pixel is rounded on the way.
    one_level = 1.001 / 50 if size < 32 else 1e-5
    assert (at_once(images, chance, (size, size), **options) - expected).abs().max() <= one_level


def test_with_a_mean_image_colours_are_shifted_as_without() -> None:
    images, chance = pictures(3, 8), torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    mean = mean_image(8, 8)
    for step in (device_step, at_once):
        plain = step(images, chance, (8, 8), mean=(0.0, 0.0, 0.0), std=(2.0, 3.0, 4.0))
        ours = step(images, chance, (8, 8), mean=mean, std=(2.0, 3.0, 4.0))
        expected = plain - mean / torch.tensor([2.0, 3.0, 4.0])[:, None, None]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(32, 26), (8, 8), (32, 64)])
def test_a_flat_mean_image_is_three_numbers(shape: tuple[int, int]) -> None:
    flat = torch.tensor(IMAGENET_MEAN)[:, None, None].expand(3, 20, 30).contiguous()
    images, chance = pictures(2, 32), torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    for step in (device_step, at_once):
        with_image = step(images, chance, shape, mean=flat, std=IMAGENET_STD)
        torch.testing.assert_close(
            with_image, step(images, chance, shape, mean=IMAGENET_MEAN, std=IMAGENET_STD), rtol=0, atol=1e-5
        )
    views = pictures(6, 8).view(2, 3, 3, 8, 8)
    torch.testing.assert_close(
        normalise(views, flat, IMAGENET_STD), normalise(views, IMAGENET_MEAN, IMAGENET_STD), rtol=0, atol=1e-5
    )


def test_whole_pictures_have_the_mean_image_warped_to_their_sides() -> None:
    picture, mean = pictures(1, 32)[:, :, :24], mean_image(32, 32)  # (1, 3, 24, 32)
    out = normalise(picture[None], mean, IMAGENET_STD)[0]
    expected = (picture - resize(mean[None], (24, 32))) / torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_mean_image_that_was_warped_in_testing_serves_training() -> None:
    images, mean = pictures(2, 16), mean_image(16, 16)
    with torch.inference_mode():
        normalise(images, mean, IMAGENET_STD)
    layer = torch.nn.Conv2d(3, 2, 3)
    out = device_step(images, uniforms(2), (16, 16), mean=mean, std=IMAGENET_STD)
    layer(out).sum().backward()
    assert layer.weight.grad is not None
    other = mean + 1  # another image of the same size is another
    assert not torch.equal(normalise(images, other, IMAGENET_STD), normalise(images, mean, IMAGENET_STD))
