from __future__ import annotations

import os

import pytest

from spp_cls.data import facts as facts_module
from spp_cls.data.facts import Facts, look_at


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []

    def noted(file: str, whole: bool) -> Facts:
        names.append(os.path.basename(file))
        return look_at(file, whole)

    monkeypatch.setattr(facts_module, "look_at", noted)
    return names
