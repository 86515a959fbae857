"""The LightningModule: loss, errors, optimizer and schedule round a net that it is handed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from .schedules import Schedule

# Sums of losses are kept in whole numbers of this size, so that they do not depend on the order of adding.
_LOSS_UNIT = 2.0**-20
_LARGEST_LOSS = 2.0**20  # what is more counts as this, so that the sum over eight million images fits
_STATES = ("count", "wrong1", "wrong5", "loss", "not_finite")


class Errors(Metric):
    """Top-1 and top-5 error in percent and mean loss; exact counts, summed over the ranks."""

    full_state_update = False
    count: Tensor
    wrong1: Tensor
    wrong5: Tensor
    loss: Tensor
    not_finite: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in _STATES:
            self.add_state(state, torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor, losses: Tensor) -> None:
        """`scores` (B, K) of any scale, `labels` (B,), `losses` (B,)."""
        best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]  # (B, 5)
        # In place by name: `+=` would go through __setattr__ of Module, which takes its time.
        self.count.add_(len(labels))
        self.wrong1.add_((~best[:, 0]).sum())
        self.wrong5.add_((~best.any(1)).sum())
        finite = losses.isfinite()  # no whole number stands for the others
        self.not_finite.add_((~finite).sum())
        self.loss.add_((losses.where(finite, 0).clamp(max=_LARGEST_LOSS) / _LOSS_UNIT).round().long().sum())

    def compute(self) -> dict[str, float]:
        """The loss is nan where one of the losses was infinite or nan."""
        count = max(1, int(self.count))
        return {
            "top1_error": 100 * int(self.wrong1) / count,
            "top5_error": 100 * int(self.wrong5) / count,
            "loss": math.nan if self.not_finite else int(self.loss) * _LOSS_UNIT / count,
        }

    def sums(self) -> list[int]:
        """What all ranks have counted so far; called on all of them at once."""
        with self.sync_context():
            return [int(getattr(self, state)) for state in _STATES]

    def go_on_from(self, sums: Sequence[int]) -> None:
        """Count on from `sums`; called on one rank alone."""
        for state, value in zip(_STATES, sums, strict=True):
            getattr(self, state).fill_(value)


class Classifier(LightningModule):
    """Trains `net`, a module (B, 3, H, W) → logits (B, K), on batches `images, labels`.

    Args:
        net: any net that takes the sizes that come.
        optimizer: parameters or parameter groups → optimizer.
        schedule: a function of `spp_cls.schedules`.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: weight of each class in the loss, or None.
        bias_lr: factor on the learning rate of biases; the released ZF-5 has 2.
        lr_fan_in: weights with more inputs than this learn at a rate smaller by as much; None for one rate. A step of
            Adam moves every weight by about the rate, so outputs by the rate × inputs (Yang et al. 2022, μP): without
            it, a rate for a quarter of ZF-5 keeps the whole of it at chance.
        channels_last: keep maps in the memory format that is faster on most machines.
        val_sizes: the test size in px of each validation loader; errors of the first are `val/top1_error`, of the
            others `val/top1_error_180`.
        seed: of dropout, which is drawn anew for each micro-batch from (seed, rank, its number).
        identity: plain data that says what the net is (config, classes, pixels); stored in every checkpoint.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: Schedule,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        bias_lr: float = 1.0,
        lr_fan_in: int | None = None,
        channels_last: bool = True,
        val_sizes: Sequence[int] = (224,),
        seed: int = 0,
        identity: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.optimizer, self.schedule = optimizer, schedule
        self.label_smoothing, self.bias_lr, self.lr_fan_in = label_smoothing, bias_lr, lr_fan_in
        self.val_sizes, self.seed, self.identity = tuple(val_sizes), seed, identity or {}
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.train_errors = Errors()
        self.val_errors = nn.ModuleList(Errors() for _ in self.val_sizes)
        self.test_errors = Errors()
        self.past_errors: list[float] = []  # val/top1_error of each epoch: what a plateau is seen in
        self.test_scores: dict[int, tuple[int, Tensor]] = {}  # row in the index → label, scores (K,)
        self.test_seconds = 0.0  # of the test made last, from the setting up of its loader on
        self._test_began = 0.0
        self._views_so_far: dict[int, int] = {}  # row in the index → how many views its scores are the mean of

    def forward(self, images: Tensor) -> Tensor:
        # A compiled net has a graph for each shape of a batch. Testing has many shapes, and runs the net as it is.
        logits: Tensor = self.net(images) if self.training else self.net._call_impl(images)  # type: ignore[no-untyped-call]
        return logits

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each image (B,), weighted by class."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(wide, labels, reduction="none", label_smoothing=self.label_smoothing)
        weights = self.class_weights
        return losses if weights is None else losses * weights[labels]  # type: ignore[index]

    def scores(self, views: Tensor, windows: Tensor | None = None) -> Tensor:
        """(B, V, 3, h, w) → class probabilities (B, K): the softmax of each view, averaged (He et al. 2014, §3.1.1)."""
        return self.scores_of_views(views, windows).mean(1)

    def scores_of_views(self, views: Tensor, windows: Tensor | None = None) -> Tensor:
        """(B, V, 3, h, w) → the softmax of each view (B, V, K).

        With windows (N, 5) in px (which of the V, top, left, bottom, right), these are the views of each image:
        (B, N, K). They are pooled from the maps of the V (He et al. 2014, §3.1.5).
        """
        images = views.flatten(0, 1)
        if windows is None:
            logits = self(images)  # (B·V, K)
        else:
            first = torch.zeros_like(windows[0])
            first[0] = views.shape[1]  # image i has the maps from i · V
            each = torch.stack([windows + i * first for i in range(len(views))])  # (B, N, 5)
            logits = self.net.forward_windows(images, each.flatten(0, 1))  # type: ignore[operator]
        return torch.unflatten(logits.float().softmax(-1), 0, (len(views), -1))

    def setup(self, stage: str) -> None:
        self._test_began = time.perf_counter()
        views: Any = getattr(getattr(self.trainer, "datamodule", None), "views", None)
        if hasattr(views, "check"):
            views.check(self.net)  # before training, and not when that is done

    # Training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of where training stands, so that there is no random state to save.
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        # A hash, because torch's generator on a CPU looks at the lower 32 bits of a seed alone.
        place = f"{self.seed}/{self.trainer.global_rank}/{number}".encode()
        seed = int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def on_train_epoch_start(self) -> None:
        self.train_errors.reset()  # of an epoch that trainer.max_time has cut; one that is gone on with begins no epoch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        losses = self.losses(logits, labels)
        self.train_errors.update(logits.detach(), labels, losses.detach())
        if self.trainer.is_last_batch:  # here, and not at the end of the epoch, where callbacks would come first
            self._report("train", self.train_errors)
        # Of a global batch that does not divide, parts are of different size, and each image shall count the same.
        weight = getattr(getattr(self.trainer, "datamodule", None), "batch_weight", 1.0)
        return losses.mean() * weight

    def configure_optimizers(self) -> Any:
        groups: dict[float, list[nn.Parameter]] = {1.0: []}  # factor on the learning rate → parameters
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self._lr_factor(name, parameter), []).append(parameter)
        groups = {factor: parameters for factor, parameters in groups.items() if parameters}
        optimizer = self.optimizer([{"params": parameters} for parameters in groups.values()])
        # A fused optimizer would unscale the gradients of 16-mixed itself, after they should have been clipped.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for group, factor in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] *= factor
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def scheduled(step: int) -> float:
            return self.schedule(min(1.0, step / total), self.past_errors)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, name: str, parameter: nn.Parameter) -> float:
        if name.endswith("bias"):
            return self.bias_lr
        fan_in = parameter[0].numel()
        return min(1.0, self.lr_fan_in / fan_in) if self.lr_fan_in and parameter.ndim > 1 else 1.0

    # Validation: one view of each image, at fixed sizes

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        logits = self(images)
        self._val_errors(dataloader_idx).update(logits, labels, self.losses(logits, labels))

    def _val_errors(self, i: int) -> Errors:
        errors = self.val_errors[i]
        assert isinstance(errors, Errors)
        return errors

    def on_validation_epoch_end(self) -> None:
        for i, size in enumerate(self.val_sizes):
            values = self._report("val", self._val_errors(i), f"_{size}" if i else "")
            if i == 0 and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
                self.past_errors.append(values["top1_error"])

    # Testing: scores averaged over views, which may come in several batches

    def on_test_epoch_start(self) -> None:
        self.test_scores.clear()
        self._views_so_far.clear()

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        views, labels, rows, *windows = batch
        scores = self.scores_of_views(views, *windows)  # (B, V, K)
        number = scores.shape[1]
        for row, label, mean in zip(rows.tolist(), labels.tolist(), scores.mean(1).cpu(), strict=True):
            before = self._views_so_far.get(row, 0)
            self._views_so_far[row] = before + number
            if before:
                mean = self.test_scores[row][1].lerp(mean, number / (before + number))
            self.test_scores[row] = (label, mean.clone())  # alone: a row would carry its whole batch along

    def on_test_epoch_end(self) -> None:
        tested = list(self.test_scores.values())
        for i in range(0, len(tested), 1024):
            labels = torch.tensor([label for label, _ in tested[i : i + 1024]], device=self.device)
            scores = torch.stack([mean for _, mean in tested[i : i + 1024]]).to(self.device)
            losses = F.nll_loss(scores.clamp_min(1e-12).log(), labels, reduction="none")
            self.test_errors.update(scores, labels, losses)
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.test_scores)
            self.test_scores = {row: scored for part in gathered for row, scored in part.items()}
        self.test_seconds = time.perf_counter() - self._test_began
        self._report("test", self.test_errors)

    def _report(self, split: str, errors: Errors, suffix: str = "") -> dict[str, float]:
        values: dict[str, float] = errors.compute()
        errors.reset()
        # Not to the loggers: they are written from the history, so that both say the same.
        named = {f"{split}/{name}{suffix}": value for name, value in values.items()}
        self.log_dict(named, logger=False, batch_size=1)
        return values

    # Checkpoints

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, *, weights_only: bool = True, trust: bool = False
    ) -> Classifier:
        """The classifier of a checkpoint, in eval mode, built by the config inside it; nothing else need be there.

        No code in the file is run. What its config names to be built is refused where it was not written in spp_cls,
        torch, torchvision, lightning or timm, unless `trust`. Raises ValueError.
        """
        from .build import load_classifier  # the one way back: a checkpoint alone says what net it was

        if not weights_only:
            raise ValueError("weights_only=False would run what code is in the file; checkpoints of spp_cls need none")
        classifier = load_classifier(Path(checkpoint_path), trust)
        return classifier if map_location is None else classifier.to(map_location)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["spp_cls"] = {
            "identity": self.identity,
            "past_errors": list(self.past_errors),
            "train_errors": self.train_errors.sums(),  # of the epoch that is under way
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint.get("spp_cls", {})
        self.past_errors = list(ours.get("past_errors", []))
        if "train_errors" in ours and self.global_rank == 0:  # the sum over the ranks, so one of them takes it
            self.train_errors.go_on_from(ours["train_errors"])
