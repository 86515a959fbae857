from __future__ import annotations

import pytest

from spp_cls.words import duration, operations, printable


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (5999, "100 min"), (11520, "3.2 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(2.8e16, "28.000 PFLOP"), (1e14, "0.100 PFLOP"), (3.21e12, "3.21 TFLOP"), (5e8, "0.0005 TFLOP")],
)
def test_operations(number: float, said: str) -> None:
    assert operations(number) == said


def test_names_of_others_do_nothing_to_a_terminal() -> None:
    assert printable("ü \udcff\t\x1b[31m\n") == r"ü \udcff\t\x1b[31m\n"
