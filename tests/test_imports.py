"""Imports point one way: programs → build → classifier; nets and data know nothing of each other, nor of Hydra."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spp_cls

PACKAGE = Path(spp_cls.__file__).parent
PROGRAMS = (
    "train", "evaluate", "predict", "export", "plan", "check", "log", "cache", "table", "runs", "report", "sweep",
)  # fmt: skip
KNOW_HYDRA = {f"spp_cls.{name}" for name in ("door", "going_on", "build", "grid", *PROGRAMS)}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that `source` imports, wherever in it, by its whole name."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            # What is imported may be a module itself, as in `from .data import views`.
            names |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {
    module_name(path): imported(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    for path in sorted(PACKAGE.rglob("*.py"))
}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def those_inside(package: str) -> Iterator[tuple[str, set[str]]]:
    found = [(module, names) for module, names in IMPORTS.items() if inside(module, package)]
    assert found, package
    return iter(found)


def test_the_reader_of_imports() -> None:
    source = "import a.b\nfrom . import c\nfrom .d import e\nfrom ..f import g\ndef h():\n    from i import j\n"
    assert imported(source, "spp_cls.x.y", is_package=False) == {
        "a.b", "spp_cls.x", "spp_cls.x.c", "spp_cls.x.d", "spp_cls.x.d.e", "spp_cls.f", "spp_cls.f.g", "i", "i.j",
    }  # fmt: skip
    assert "spp_cls.x.y.d" in imported(source, "spp_cls.x.y", is_package=True)


def test_nets_import_torch_and_themselves_alone() -> None:
    for module, names in those_inside("spp_cls.models"):
        foreign = {n for n in names if not inside(n, "torch") and not inside(n, "spp_cls.models")}
        assert {n.partition(".")[0] for n in foreign} <= sys.stdlib_module_names, module


def test_data_and_nets_know_nothing_of_each_other() -> None:
    for module, names in those_inside("spp_cls.data"):
        assert not [n for n in names if inside(n, "spp_cls.models") or inside(n, "spp_cls.borrowed")], module
    for module, names in those_inside("spp_cls.models"):
        assert not [n for n in names if inside(n, "spp_cls.data")], module


def test_the_classifier_is_handed_its_net_and_its_data() -> None:
    own = {name for name in IMPORTS["spp_cls.classifier"] if inside(name, "spp_cls")}
    # The one way back: a checkpoint alone says what net it was, and to build that is the build's.
    way_back = {"spp_cls.build", "spp_cls.build.load_classifier"}
    assert own == {"spp_cls.schedules", "spp_cls.schedules.Schedule", *way_back}


def test_hydra_stands_in_the_door_the_build_and_the_programs_alone() -> None:
    for module, names in IMPORTS.items():
        hydra = {n for n in names if inside(n, "hydra") or inside(n, "omegaconf")}
        assert not hydra or module in KNOW_HYDRA, (module, hydra)


@pytest.mark.parametrize(
    "module", ["cost", "schedules", "models", "data", "differences", "ranks", "resume", "callbacks"]
)
def test_nothing_points_back_to_the_programs(module: str) -> None:
    for name, names in those_inside(f"spp_cls.{module}"):
        assert not [n for n in names for above in KNOW_HYDRA | {"spp_cls.__main__"} if inside(n, above)], name


@pytest.mark.parametrize("module", ["spp_cls", "spp_cls.__main__", "spp_cls.door", "spp_cls.runs"])
def test_the_way_to_the_help_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'torchvision', 'lightning', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
