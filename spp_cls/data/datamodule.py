"""The datamodule that gives any LightningModule batches of the planned size: 180, 224, 180, … by the epoch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from .device import device_step, normalise
from .index import SPLITS, Index, make_index
from .layouts import Listing
from .plan import Plan
from .sizes import Sizes, planned
from .source import PLACES, TrainBatch, TrainSource, ViewsBatch, ViewsSource
from .views import Views

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # grey levels, R, G, B
IMAGENET_STD = (58.395, 57.12, 57.375)

Batch = TypeVar("Batch", TrainBatch, ViewsBatch)


class MultiSizeDataModule(LightningDataModule):
    """Training batches `images, labels` at `sizes(seed, epoch, batch)` px; test batches by `views`.

    Args:
        root: the folder of the pictures.
        layout: how it is laid out, a function of `spp_cls.data.layouts` with its options.
        sizes: (seed, epoch, batch) → training size in px, at most `region`.
        views: what `test_dataloader` gives: `views, labels, rows` with views (B, V, 3, h, w).
        batch_size: images of one optimizer step, over all devices and accumulated micro-batches.
        region: side in px of the region that is read from each training picture.
        resize: shorter side in px that a picture is resized to before the region is cut.
        place: where: `anywhere`, or `five` for the centre and the four corners.
        flip: share of mirrored training pictures.
        colour: σ of the PCA colour shift of training pictures, 0.1 as in Krizhevsky et al. 2012; 0 for none.
        mean, std: what pixels are normalised by, in grey levels (0–255).
        val_sizes: test sizes in px, by centre crop, of the validation after each epoch; the first decides.
        num_workers: processes that read; None for one a core, at most 8, shared among the devices of this machine.
        seed: of order and chance.
    """

    def __init__(
        self,
        root: str,
        layout: Callable[[Path], Listing],
        sizes: Sizes,
        views: Views | None = None,
        batch_size: int = 64,
        region: int = 224,
        resize: int = 256,
        place: str = "anywhere",
        flip: float = 0.5,
        colour: float = 0.1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        val_sizes: Sequence[int] | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if region > resize:
            raise ValueError(f"data.region={region} is more than data.resize={resize}: a region is cut from it")
        if place not in PLACES:
            raise ValueError(f"data.place={place!r}: use one of {', '.join(PLACES)}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"data.mean={list(mean)}, data.std={list(std)}: give three grey levels each, std above 0")
        self.root, self.layout, self.sizes = Path(root), layout, sizes
        self.batch_size, self.region, self.resize, self.place = batch_size, region, resize, place
        self.flip, self.colour, self.mean, self.std = flip, colour, tuple(mean), tuple(std)
        self.views = self.sized(views or Views("center_crop"))
        self.test_split = "test"
        self.val_sizes = tuple(val_sizes or (region,))
        self.num_workers, self.seed = num_workers, seed
        self.index: Index | None = None
        self._position = {"epoch": 0, "batch": 0}
        self._restored = False  # the next pass over the training loader goes on at the position

    def setup(self, stage: str | None = None) -> None:
        """Make the index, once."""
        if self.index is None:
            self.index = make_index(self.root, self.layout)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; after `setup`."""
        return self._index.classes

    @property
    def plan(self) -> Plan:
        """Which images make up which batch on this rank; after `setup`."""
        trainer = self.trainer
        return Plan(
            len(self._index.rows("train")),
            self.batch_size,
            self.seed,
            trainer.global_rank if trainer else 0,
            trainer.world_size if trainer else 1,
            trainer.accumulate_grad_batches if trainer else 1,
        )

    def size_at(self, epoch: int, batch: int) -> int:
        """The planned training size in px of the global batch `batch`."""
        return planned(self.sizes, self.seed, epoch, batch, self.region)

    def planned_sizes(self, epochs: int, batches: int | None = None) -> dict[int, list[int]]:
        """Epoch → the sizes in px that occur in it, by first occurrence."""
        batches = batches or self.plan.num_batches
        return {e: list(dict.fromkeys(self.size_at(e, b) for b in range(batches))) for e in range(epochs)}

    # Loaders

    def train_dataloader(self) -> Loader[TrainBatch]:
        plan = self.plan

        def batches() -> Iterator[Any]:
            # Read when the first batch is asked for: Lightning makes iterators before it has restored its epoch.
            yield from plan.micro_batches(*self._begin())

        def arrived(handed_out: int, batch: TrainBatch, asked: Any) -> TrainBatch:
            done = asked.batch + (handed_out % plan.accumulation == 0)
            self._position = {"epoch": asked.epoch, "batch": done}
            return batch._replace(size=self.size_at(asked.epoch, asked.batch))

        return Loader(self._train_source, batches, len(plan), self._workers(), arrived)

    def regions_loader(self, epoch: int) -> Loader[TrainBatch]:
        """The regions of one epoch, from its beginning and before any device step; moves no position."""
        plan = self.plan
        batches = partial(plan.micro_batches, epoch)
        return Loader(self._train_source, batches, len(plan), self._workers(), lambda _, batch, __: batch)

    def val_dataloader(self) -> list[Loader[ViewsBatch]]:
        return [self.views_loader(Views("center_crop", size), "val") for size in self.val_sizes]

    def test_dataloader(self) -> Loader[ViewsBatch]:
        return self.views_loader(self.views, self.test_split)

    def views_loader(self, views: Views, split: str) -> Loader[ViewsBatch]:
        """Every image of `split` once, over all ranks together, as batches of `views`."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: use one of {', '.join(SPLITS)}")
        source = ViewsSource(self._index, self.sized(views), self.resize, self.region)
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # Images are dealt out, not batches: a rank without any would end the run, and ranks would wait for each other.
        batches = source.batches(self._index.rows(split)[rank::ranks], max(1, self.batch_size // ranks))
        return Loader(source, lambda: iter(batches), len(batches), self._workers(), lambda _, batch, __: batch)

    def sized(self, views: Views) -> Views:
        """`views` with the region's size where they name none."""
        return Views(views.crops, views.size or self.region)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The device step: `images, labels` for training and validation, `views, labels, rows` for testing."""
        if isinstance(batch, TrainBatch):
            images = device_step(
                batch.images,
                batch.uniforms,
                batch.size,
                mean=self.mean,
                std=self.std,
                flip=self.flip,
                colour=self.colour,
            )
            return images, batch.labels
        if isinstance(batch, ViewsBatch):
            views = normalise(batch.views, self.mean, self.std)  # (B, V, 3, h, w)
            if self.trainer is not None and (self.trainer.validating or self.trainer.sanity_checking):
                return views[:, 0].contiguous(memory_format=torch.channels_last), batch.labels
            return views, batch.labels, batch.rows
        return batch

    # Position: restored before any loader exists, so that no order of Lightning's calls can lose it.

    def state_dict(self) -> dict[str, int]:
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = {"epoch": state_dict["epoch"], "batch": state_dict["batch"]}
        self._restored = True

    @property
    def _index(self) -> Index:
        if self.index is None:
            raise RuntimeError("call setup() first: the index of the pictures is made there")
        return self.index

    @property
    def _train_source(self) -> TrainSource:
        return TrainSource(self._index, self._index.rows("train"), self.resize, self.region, self.place)

    def _begin(self) -> tuple[int, int]:
        """Epoch and first global batch of the pass over the training loader that begins now."""
        epoch, batch = self._position["epoch"], self._position["batch"]
        restored, self._restored = self._restored, False
        if self.trainer is None:  # a plain loop: each pass is the next epoch
            goes_on = batch == 0 or (restored and batch < self.plan.num_batches)
            return (epoch, batch) if goes_on else (epoch + 1, 0)
        if getattr(self.trainer, "overfit_batches", 0):  # every epoch is the first, so that its pictures stay the same
            return 0, 0
        now = self.trainer.current_epoch
        return now, batch if restored and epoch == now else 0

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        devices = self.trainer.num_devices if self.trainer else 1
        return min(8, max(1, (os.cpu_count() or 1) // devices))


class Loader(Generic[Batch]):
    """A source read in the order that `batches()` gives, by worker processes that live as long as the loader.

    No `torch.utils.data.DataLoader` to Lightning, so that it never rebuilds it with another sampler; everything that
    differs by rank and epoch is in what `batches` yields. `arrived(n, batch, asked)` sees each batch as it is handed
    out, n counting from 1.
    """

    def __init__(
        self,
        source: TrainSource | ViewsSource,
        batches: Callable[[], Iterator[Any]],
        length: int,
        num_workers: int,
        arrived: Callable[[int, Batch, Any], Batch],
    ) -> None:
        self._asked = _Asked(batches)
        self._length = length
        self._arrived: Callable[[int, Batch, Any], Batch] = arrived
        self._loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._asked,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        self._asked.waiting.clear()
        for handed_out, batch in enumerate(self._loader, start=1):
            if isinstance(batch, ValueError):
                raise batch
            yield self._arrived(handed_out, batch, self._asked.waiting.popleft())

    # Lightning warns of resuming with a loader that has no state. The position is the datamodule's.

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    # Lightning ends the workers of what it finds under this name: left to the end of Python, each costs 5 seconds.

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator


class _Asked:
    """The sampler: keeps what it asked for, in order, until that is handed out.

    It does not know its loader: in a circle of references, Python would take the queues down before the workers.
    """

    def __init__(self, batches: Callable[[], Iterator[Any]]) -> None:
        self._batches = batches
        self.waiting: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        for asked in self._batches():
            self.waiting.append(asked)
            yield asked


def to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Normalised images (B, 3, H, W) → pixels (B, H, W, 3), for looking at."""
    mean_, std_ = (images.new_tensor(tuple(v))[:, None, None] for v in (mean, std))
    pixels = (images * std_ + mean_).round().clamp(0, 255).byte()
    array: np.ndarray[Any, np.dtype[np.uint8]] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return array
