from __future__ import annotations

import pytest

from spp_cls.words import duration, printable


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (5999, "100 min"), (11520, "3.2 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_names_of_others_do_nothing_to_a_terminal() -> None:
    assert printable("ü \udcff\t\x1b[31m\n") == r"ü \udcff\t\x1b[31m\n"
