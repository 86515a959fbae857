from __future__ import annotations

import pytest
import torch

from spp_cls.data.distortions import rotate, shift, stretch

IMAGE = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)


def test_a_shift_moves_right_and_down_and_repeats_the_edge() -> None:
    moved = shift(IMAGE, share=0.25)  # by one pixel of four
    assert torch.equal(moved[:, 1:, 1:], IMAGE[:, :-1, :-1])
    assert torch.equal(moved[:, 0, 1:], IMAGE[:, 0, :-1]) and torch.equal(moved[:, 1:, 0], IMAGE[:, :-1, 0])
    assert torch.equal(shift(IMAGE, share=0.0), IMAGE)
    assert (shift(IMAGE, share=1.0)[:, :, 0] == IMAGE[:, :1, 0]).all()


def test_quarter_turns_are_exact() -> None:
    square = IMAGE[:, :, :4]
    assert torch.equal(rotate(square, degrees=90), square.rot90(1, (1, 2)))
    assert torch.equal(rotate(square, degrees=180), square.flip(1, 2))
    assert torch.equal(rotate(IMAGE, degrees=0), IMAGE)
    assert torch.equal(rotate(IMAGE, degrees=180), IMAGE.flip(1, 2))


def test_a_rotation_keeps_the_shape_of_things_in_a_wide_picture() -> None:
    """A bar from the middle to the right, turned by 90°, goes from the middle up, as long as it was."""
    wide = torch.zeros(3, 41, 81, dtype=torch.uint8)
    wide[:, 20, 41:56] = 200
    turned = rotate(wide, degrees=90)
    assert (turned[:, 5:20, 40] == 200).all() and int((turned > 0).sum()) == 3 * 15


@pytest.mark.parametrize(("factor", "width"), [(0.5, 3), (1.0, 6), (2.0, 12), (0.01, 1)])
def test_stretching_changes_the_width_alone(factor: float, width: int) -> None:
    assert stretch(IMAGE, factor=factor).shape == (3, 4, width)


def test_a_picture_of_one_colour_stays_so() -> None:
    grey = torch.full((3, 17, 23), 99, dtype=torch.uint8)
    for distorted in (shift(grey, share=0.3), rotate(grey, degrees=33), stretch(grey, factor=1.4)):
        assert (distorted == 99).all() and distorted.dtype == torch.uint8
