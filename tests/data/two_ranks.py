"""Started by test_datamodule.py: trains on two ranks and writes what each of them received.

Goes on from last.ckpt where there is one; ends without a word before the optimizer step `kill_at`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")

from lightning import Callback, LightningModule, Trainer  # noqa: E402

from spp_cls.callbacks import PlannedSize  # noqa: E402
from spp_cls.classifier import Classifier  # noqa: E402
from spp_cls.data import MultiSizeDataModule, Views  # noqa: E402
from spp_cls.data.layouts import folder  # noqa: E402
from spp_cls.data.sizes import alternating  # noqa: E402
from spp_cls.models import sppnet  # noqa: E402
from spp_cls.resume import AtomicCheckpointIO, History, ResumePoint  # noqa: E402
from spp_cls.schedules import constant  # noqa: E402


def fingerprint(images: Tensor) -> list[str]:
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16] for image in images]


class Stranger(LightningModule):
    """Knows nothing of sizes, plans or this package; writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)
        self.received: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.received["train"].append((images.shape[-1], labels.tolist(), fingerprint(images)))
        return F.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        self.received["val"].append((self.current_epoch, images.shape[-1], labels.tolist(), fingerprint(images)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        views, _, rows, *_ = batch
        self.received["test"].append((list(views.shape), rows.tolist()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise SystemExit(3)


def main(root: str, out: str, workers: str, kill_at: str = "-1") -> None:
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    datamodule = MultiSizeDataModule(
        root,
        folder,
        partial(alternating, sizes=[26, 32]),
        Views("multi_scale_full"),
        batch_size=8,
        region=32,
        resize=36,
        val_sizes=(32, 26),
        num_workers=int(workers),
    )
    module = Stranger()
    trainer = Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Kill(int(kill_at)), PlannedSize(), History(Path(out)), ResumePoint(Path(out), every_minutes=0)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=out,
    )
    last = Path(out, "last.ckpt")
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=last if last.exists() else None, weights_only=True)
        trainer.test(module, datamodule=datamodule, verbose=False)
        classifier = Classifier(net=sppnet("tiny", 3, width=0.25), optimizer=torch.optim.SGD, schedule=constant)
        trainer.test(classifier, datamodule=datamodule, verbose=False)
        errors = {name: float(value) for name, value in trainer.callback_metrics.items()}
        scores = {row: (label, mean.tolist()) for row, (label, mean) in classifier.test_scores.items()}
        Path(out, f"scores{trainer.global_rank}.json").write_text(json.dumps({"errors": errors, "scores": scores}))
    finally:
        Path(out, f"rank{trainer.global_rank}.json").write_text(json.dumps(module.received))


if __name__ == "__main__":
    main(*sys.argv[1:])
