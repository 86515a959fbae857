"""The datamodule that gives any LightningModule batches of the planned size: 180, 224, 180, … by the epoch."""

from __future__ import annotations

import ctypes
import math
import os
import queue
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from .cache import KINDS, choose, make_cache
from .device import Mean, device_step, normalise
from .full_image import Cut, FullImage, cut
from .index import ON_BAD, SPLITS, Index, usable_index
from .layouts import Listing
from .mean_image import find_mean_image
from .plan import LAST_BATCHES, Plan, Shape, order_of_batches
from .reader import MAX_PIXELS
from .sizes import Sizes, planned
from .source import PLACES, Files, Pictures, TrainBatch, TrainSource, ViewsBatch, ViewsSource, resized_shapes
from .views import Views

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # grey levels, R, G, B
IMAGENET_STD = (58.395, 57.12, 57.375)
READ_AHEAD = 2  # batches that a thread has ready

Batch = TypeVar("Batch", TrainBatch, ViewsBatch)


class MultiSizeDataModule(LightningDataModule):
    """Training batches `images, labels` at `sizes(seed, epoch, batch)` px; test batches by `views`.

    Args:
        root: the folder of the pictures.
        layout: how it is laid out, a function of `spp_cls.data.layouts` with its options.
        sizes: (seed, epoch, batch) → training size in px, at most `region`; or `FullImage`, for whole pictures.
        views: what `test_dataloader` gives: `views, labels, rows` with views (B, V, 3, h, w); where views are pooled
            from the maps of these, `views, labels, rows, windows` with windows (N, 5) in px.
        batch_size: images of one optimizer step, over all devices and accumulated micro-batches.
        region: side in px of the region that is read from each training picture.
        resize: shorter side in px that a picture is resized to before the region is cut.
        place: where: `anywhere`, or `five` for the centre and the four corners.
        flip: share of mirrored training pictures.
        colour: σ of the PCA colour shift of training pictures, 0.1 as in Krizhevsky et al. 2012; 0 for none.
        mean, std: what pixels are normalised by, in grey levels (0–255).
        mean_image: instead of `mean`, an image of it, warped to the size that comes: a .npy or .png file, or `train`
            for the mean of the training regions, computed once.
        val_sizes: test sizes in px, by centre crop, of the validation after each epoch; the first decides.
        num_workers: processes that read; None for one a core, at most 8, shared among the devices of this machine;
            "thread" for a thread of this process, which is what a raw cache is read by where None is given.
        seed: of order and chance.
        last_batch: `drop` the last, short batch of an epoch, or `keep` it.
        on_bad: `stop` where a picture cannot be read, or `skip` such pictures, found before training.
        max_bad: share of the pictures that may be skipped.
        draft: decode large JPEGs at 1/2, 1/4 or 1/8 of their size where that is enough; training pictures only.
        cache: read training pictures from a cache, `raw` or `jpeg`, made where it is not there; `auto` chooses.
        cache_folder: where caches lie; None is the user's cache folder.
    """

    def __init__(
        self,
        root: str,
        layout: Callable[[Path], Listing],
        sizes: Sizes | FullImage,
        views: Views | None = None,
        batch_size: int = 64,
        region: int = 224,
        resize: int = 256,
        place: str = "anywhere",
        flip: float = 0.5,
        colour: float = 0.1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        mean_image: str | None = None,
        val_sizes: Sequence[int] | None = None,
        num_workers: int | str | None = None,
        seed: int = 0,
        last_batch: str = "drop",
        on_bad: str = "stop",
        max_bad: float = 0.01,
        draft: bool = True,
        cache: str | None = None,
        cache_folder: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "region": region, "resize": resize}.items():
            _check_whole(name, value, 1)
        for size in val_sizes or ():
            _check_whole("val_sizes", size, 1)
        if num_workers is not None and num_workers != "thread":
            _check_whole("num_workers", num_workers, 0, "a number of processes, thread, or null")
        if not 0 <= flip <= 1:
            raise ValueError(f"data.flip={flip}: use a share from 0 to 1")
        if colour < 0:
            raise ValueError(f"data.colour={colour}: use 0 or more")
        if last_batch not in LAST_BATCHES:
            raise ValueError(f"data.last_batch={last_batch!r}: use one of {', '.join(LAST_BATCHES)}")
        if on_bad not in ON_BAD or not 0 <= max_bad <= 1:
            raise ValueError(
                f"data.on_bad={on_bad!r}, data.max_bad={max_bad}: use stop or skip, and a share from 0 to 1"
            )
        if region > resize:
            raise ValueError(f"data.region={region} is more than data.resize={resize}: a region is cut from it")
        if place not in PLACES:
            raise ValueError(f"data.place={place!r}: use one of {', '.join(PLACES)}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"data.mean={list(mean)}, data.std={list(std)}: give three grey levels each, std above 0")
        if cache not in (None, "auto", *KINDS):
            raise ValueError(f"data.cache={cache!r}: use {', '.join(KINDS)}, auto, or null")
        self.root, self.layout, self.sizes = Path(root), layout, sizes
        self.batch_size, self.region, self.resize, self.place = batch_size, region, resize, place
        self.flip, self.colour, self.std, self.mean_image = flip, colour, tuple(std), mean_image
        self.mean: Mean = tuple(mean)
        self.views = self.sized(views or Views("center_crop"))
        self.test_split = "test"
        self.val_sizes = tuple(val_sizes or (region,))
        self.num_workers, self.seed, self.last_batch = num_workers, seed, last_batch
        self.on_bad, self.max_bad, self.draft = on_bad, max_bad, draft
        self.cache, self.cache_folder = cache, cache_folder
        self.device_step_seconds = 0.0  # spent in the device step so far
        self.batch_weight = 1.0  # what the mean loss of the batch that arrived last counts in that of its global batch
        self.index: Index | None = None
        self._planned: dict[tuple[int, int], dict[int, list[Shape]]] = {}
        self._position = {"epoch": 0, "batch": 0}
        self._restored = False  # the next pass over the training loader goes on at the position

    def setup(self, stage: str | None = None) -> None:
        """Make the index, and the mean image if one is wanted, once."""
        if self.index is None:
            self.index = usable_index(self.root, self.layout, self.on_bad, self.max_bad)
            self._refuse_huge(self.index)
            if self.mean_image is not None:
                self.mean = find_mean_image(self.mean_image, self.index, self.resize, self.region)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; after `setup`."""
        return self._index.classes

    @property
    def plan(self) -> Plan:
        """Which images make up which batch on this rank; after `setup`."""
        trainer = self.trainer
        return Plan(
            len(self.files.rows),
            self.batch_size,
            self.seed,
            trainer.global_rank if trainer else 0,
            trainer.world_size if trainer else 1,
            trainer.accumulate_grad_batches if trainer else 1,
            self.last_batch,
            self._cut,
        )

    @cached_property
    def _cut(self) -> Cut | None:
        """How whole pictures fall into batches; None where regions are cut from them."""
        if not isinstance(self.sizes, FullImage):
            return None
        return cut(self.files.shapes, self.batch_size, self.sizes.size, self.sizes.least)

    @cached_property
    def files(self) -> Files:
        """The training pictures as they lie on disk, at the shapes that they are needed in; after `setup`."""
        index, rows = self._index, self._index.rows("train")
        widths, heights = index.widths[rows], index.heights[rows]
        if isinstance(self.sizes, FullImage):
            return Files(index, rows, self.sizes.homes(widths, heights), self.draft)
        return Files(index, rows, resized_shapes(widths, heights, self.resize), self.draft)

    @cached_property
    def pictures(self) -> Pictures:
        """Where the training pictures are read from: the files, or a cache of them, made here where it is not there."""
        kind = self.cache_kind
        return make_cache(self.files, kind, self.cache_folder) if kind else self.files

    @cached_property
    def cache_kind(self) -> str | None:
        """The kind of cache that training reads from: `cache`, or what `auto` chose."""
        return choose(self.files, self.cache_folder) if self.cache == "auto" else self.cache

    def shape_at(self, epoch: int, batch: int) -> Shape:
        """Height and width in px that the plan gives the training pictures of the global batch `batch`."""
        if isinstance(self.sizes, FullImage):
            shape = self.plan.shape(epoch, batch)
            assert shape is not None
            return shape
        size = planned(self.sizes, self.seed, epoch, batch, self.region)
        return size, size

    def planned_shapes(self, epochs: int, batches: int | None = None) -> dict[int, list[Shape]]:
        """Epoch → the heights and widths in px that occur in it, by first occurrence."""
        plan = self.plan
        batches = batches or plan.num_batches
        if (epochs, batches) in self._planned:
            return self._planned[epochs, batches]
        if plan.cut is not None:
            turns = {e: order_of_batches(self.seed, e, len(plan.cut))[:batches] for e in range(epochs)}
            found = {e: [(h, w) for h, w in plan.cut.shapes[turn].tolist()] for e, turn in turns.items()}
        else:
            found = {e: [self.shape_at(e, b) for b in range(batches)] for e in range(epochs)}
        self._planned[epochs, batches] = {e: list(dict.fromkeys(shapes)) for e, shapes in found.items()}
        return self._planned[epochs, batches]

    def largest(self, epochs: int) -> tuple[int, Shape]:
        """Images that a device computes at once, and their shape, where these are the most px in all."""
        plan = self.plan
        shapes = {shape for planned in self.planned_shapes(epochs).values() for shape in planned}
        return max(
            ((plan.images_at_once(shape), shape) for shape in shapes), key=lambda most: most[0] * math.prod(most[1])
        )

    # Loaders

    def train_dataloader(self) -> Loader[TrainBatch]:
        plan = self.plan

        def batches() -> Iterator[Any]:
            # Read when the first batch is asked for: Lightning makes iterators before it has restored its epoch.
            yield from plan.micro_batches(*self._begin())

        def arrived(batch: TrainBatch, asked: Any) -> TrainBatch:
            self._position = {"epoch": asked.epoch, "batch": asked.batch + asked.last}
            return batch._replace(shape=asked.shape or self.shape_at(asked.epoch, asked.batch))

        return Loader(self._train_source, batches, len(plan), self._train_workers(), arrived)

    def regions_loader(self, epoch: int) -> Loader[TrainBatch]:
        """The regions of one epoch, from its beginning and before any device step; moves no position."""
        plan = self.plan
        batches = partial(plan.micro_batches, epoch)
        region = (self.region, self.region)  # and a tuple again: DataLoader makes lists of tuples

        def arrived(batch: TrainBatch, asked: Any) -> TrainBatch:
            return batch._replace(shape=asked.shape or region)

        return Loader(self._train_source, batches, len(plan), self._train_workers(), arrived)

    def val_dataloader(self) -> list[Loader[ViewsBatch]]:
        return [self.views_loader(Views("center_crop", size), "val") for size in self.val_sizes]

    def test_dataloader(self) -> Loader[ViewsBatch]:
        return self.views_loader(self.views, self.test_split)

    def views_loader(self, views: Views, split: str, shuffled: bool = False) -> Loader[ViewsBatch]:
        """Every image of `split` once in each pass of `views`, over all ranks together.

        With `shuffled` the batches come in an order of chance, so that some of them tell what all of them cost.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: use one of {', '.join(SPLITS)}")
        source = ViewsSource(self._index, self.sized(views), self.resize, self.region)
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        # Images are dealt out, not batches: a rank without any would end the run, and ranks would wait for each other.
        batches = source.batches(self._index.rows(split)[rank::ranks], max(1, self.batch_size // ranks))
        if shuffled:
            random.Random(self.seed).shuffle(batches)
        return Loader(source, lambda: iter(batches), len(batches), self._workers(), lambda batch, _: batch)

    def sized(self, views: Views) -> Views:
        """`views` with the region's size where they name none."""
        return Views(views.crops, views.size or self.region)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The device step: `images, labels` to train and validate, `views, labels, rows[, windows]` to test."""
        if isinstance(batch, TrainBatch):
            began = time.perf_counter()
            images = device_step(
                batch.images,
                batch.uniforms,
                batch.shape,
                mean=self.mean,
                std=self.std,
                flip=self.flip,
                colour=self.colour,
            )
            self.device_step_seconds += time.perf_counter() - began
            self.batch_weight = float(batch.weight)
            return images, batch.labels
        if isinstance(batch, ViewsBatch):
            views = normalise(batch.views, self.mean, self.std)  # (B, V, 3, h, w)
            if self.trainer is not None and (self.trainer.validating or self.trainer.sanity_checking):
                return views[:, 0].contiguous(memory_format=torch.channels_last), batch.labels
            rest = () if batch.windows is None else (batch.windows,)
            return views, batch.labels, batch.rows, *rest
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
        return TrainSource(self.pictures, self._index.labels[self.files.rows], self.region, self.place)

    def _begin(self) -> tuple[int, int]:
        """Epoch and first global batch of the pass over the training loader that begins now."""
        epoch, batch = self._position["epoch"], self._position["batch"]
        restored, self._restored = self._restored, False
        if self.trainer is None:  # a plain loop: each pass is the next epoch
            goes_on = batch == 0 or (restored and batch < self.plan.num_batches)
            return (epoch, batch) if goes_on else (epoch + 1, 0)
        if getattr(self.trainer, "overfit_batches", 0):  # every epoch is the first, so that its pictures stay the same
            steps = self.trainer.num_training_batches / self.plan.accumulation
            return 0, batch if restored and batch < steps else 0
        now = self.trainer.current_epoch
        return now, batch if restored and epoch == now else 0

    def _refuse_huge(self, index: Index) -> None:
        """A picture that is nearly a line would not fit into memory with its shorter side at `resize`."""
        shapes = resized_shapes(index.widths, index.heights, self.resize)
        huge = np.flatnonzero(shapes.astype(np.int64).prod(1) > MAX_PIXELS)
        if len(huge):
            row = int(huge[0])
            height, width = shapes[row].tolist()
            raise ValueError(
                f"{index.path(row)}: is {index.widths[row]}×{index.heights[row]} px, and {width}×{height} with the "
                f"shorter side at {self.resize}: crop or remove it"
            )

    def _train_workers(self) -> int | str:
        if self.num_workers is None and self.cache_kind == "raw":
            return "thread"  # to hand a batch from process to process would take longer than to read it
        return self._workers()

    def _workers(self) -> int | str:
        if self.num_workers is not None:
            return self.num_workers
        devices = self.trainer.num_devices if self.trainer else 1
        return min(8, max(1, (os.cpu_count() or 1) // devices))


def _check_whole(name: str, value: Any, least: int, use: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"data.{name}={value!r}: use {use or f'a whole number of at least {least}'}")


class Loader(Generic[Batch]):
    """A source read in the order that `batches()` gives, by worker processes that live as long as the loader.

    No `torch.utils.data.DataLoader` to Lightning, so that it never rebuilds it with another sampler; everything that
    differs by rank and epoch is in what `batches` yields. `num_workers` may be "thread". `arrived(batch, asked)` sees
    each batch as it is handed out.
    """

    def __init__(
        self,
        source: TrainSource | ViewsSource,
        batches: Callable[[], Iterator[Any]],
        length: int,
        num_workers: int | str,
        arrived: Callable[[Batch, Any], Batch],
    ) -> None:
        self._asked = _Asked(batches)
        self._length = length
        self._arrived: Callable[[Batch, Any], Batch] = arrived
        processes = 0 if isinstance(num_workers, str) else num_workers
        self._loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._asked,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=live_and_die_with_the_parent if processes else None,
        )
        self._in_thread = num_workers == "thread"

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        self._asked.waiting.clear()
        for batch in read_ahead(self._loader) if self._in_thread else self._loader:
            if isinstance(batch, ValueError):
                raise batch
            yield self._arrived(batch, self._asked.waiting.popleft())

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


def live_and_die_with_the_parent(worker: int) -> None:
    """In a worker: leave signals to the parent, and end when it does."""
    if sys.platform == "linux":
        # A worker that outlives its parent, up to five seconds, holds open the connections by which other ranks would
        # know of its end. 1 is PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Ctrl-C and what a cluster sends go to the whole group, and the program wants its next batch yet.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def read_ahead(batches: Iterable[Any], depth: int = READ_AHEAD) -> Iterator[Any]:
    """What `batches` gives, in its order, made by a thread that is at most `depth` ahead."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def run() -> None:
        try:
            for batch in batches:
                if not put("batch", batch):
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=run, name="spp_cls reader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()


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
