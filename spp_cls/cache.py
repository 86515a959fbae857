"""`spp cache`: make the cache of training pictures that `spp train` with the same words reads; list those there are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from .door import open_door
from .words import printable

if TYPE_CHECKING:
    from .data import MultiSizeDataModule


def cache(datamodule: MultiSizeDataModule) -> str:
    """Make it where it is not there yet, on all cores; says where it lies and what it takes."""
    from .data.cache import Cache, others

    pictures = datamodule.pictures
    if not isinstance(pictures, Cache):
        return f"no cache: training reads the files in {datamodule.root}"
    words = f"data.cache={pictures.kind}"
    if datamodule.cache_folder:
        words += f" data.cache_folder={datamodule.cache_folder}"
    size = len(pictures.data) / 1e6
    lines = [f"{pictures.kind} cache: {len(pictures.ends):,} pictures, {size:,.1f} MB in {pictures.folder}"]
    lines.append(f"use it: spp train … {words}")
    for kept in others(datamodule.files, pictures.kind, datamodule.cache_folder):
        size = kept.num_bytes / 1e6
        lines.append(f"another of these pictures, {size:,.1f} MB: {kept.folder} (remove it if it is not needed)")
    return "\n".join(lines)


def listed(parent: str | None) -> str:
    """All caches below `parent`, or else in the user's cache folder: a line each, the largest first."""
    from .data.cache import all_kept

    lines = []
    for kept in all_kept(parent):
        if not kept.kind:
            about = "unfinished; the spp cache that made it goes on with it"
        else:
            about = f"{kept.kind}, {kept.pictures:,} pictures of {kept.root}"
            about += "" if Path(kept.root).is_dir() else ", which is not there"
        lines.append(printable(f"{kept.num_bytes / 1e6:12,.1f} MB  {kept.folder}  ({about})"))
    return "\n".join([*lines, "remove the folder of one that is not needed"] if lines else ["there are no caches"])


def run(config: DictConfig) -> None:
    """Everything that `spp cache` does with a config."""
    from . import build

    if config.list:
        print(listed(config.data.cache_folder))
        return
    build.check_arguments(config)
    if config.data.cache is None:
        raise ValueError("data.cache=null: say which cache, data.cache=raw, jpeg or auto")
    try:
        print(cache(build.build_datamodule(config)))
    except KeyboardInterrupt:
        print("spp cache: interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


def main(arguments: list[str] | None = None) -> None:
    """The door: the same settings as `spp train`."""
    open_door("cache", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
