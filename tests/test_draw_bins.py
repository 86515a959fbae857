from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from spp_cls.models.bins import RULES

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "bins"


@pytest.fixture(scope="module")
def draw_bins() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_bins", ROOT / "scripts" / "draw_bins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_in_docs_are_what_the_script_draws(draw_bins: ModuleType) -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg")}
    drawn = draw_bins.drawings()
    assert set(committed) == set(drawn)
    stale = [name for name in drawn if committed[name] != drawn[name]]
    assert not stale, f"run `python scripts/draw_bins.py`: {stale}"


def test_every_drawing_is_shown_in_bins_md(draw_bins: ModuleType) -> None:
    page = (ROOT / "docs" / "bins.md").read_text(encoding="utf-8")
    assert all(f"(bins/{name})" in page for name in draw_bins.drawings())


def test_drawings_are_xml_with_a_background_of_their_own(draw_bins: ModuleType) -> None:
    for drawing in draw_bins.drawings().values():
        root = ElementTree.fromstring(drawing)
        background = root[0]
        assert background.get("fill") == "#ffffff"
        assert float(background.get("width", 0)) == float(root.get("width", 0)) - 1


def test_a_level_of_the_map_has_n_times_n_bins(draw_bins: ModuleType) -> None:
    for name, drawing in draw_bins.drawings().items():
        if name.startswith("appendix_a_"):
            assert drawing.count("<rect ") == 1 + 36 + 9 + 4 + 1


def test_states_of_the_papers_maps(draw_bins: ModuleType) -> None:
    state_of = draw_bins.state_of
    assert state_of(RULES["window"], 13, 6) == ("right", "")
    assert state_of(RULES["window"], 10, 6) == ("count", "9")
    assert state_of(RULES["window"], 10, 4) == ("other", "")
    assert state_of(RULES["window"], 5, 6) == ("error", "×")
    assert state_of(RULES["same"], 13, 6) == ("count", "7")
    assert state_of(RULES["ceil_padded"], 13, 6) == ("error", "×")
    assert state_of(RULES["ceil_padded"], 14, 6) == ("other", "•")
    assert state_of(RULES["floor"], 13, 2) == ("other", "")
