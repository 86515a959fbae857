from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spp_cls.classifier import Classifier, Errors
from spp_cls.models import sppnet
from spp_cls.schedules import constant, cosine, plateau

# Lightning's advice: more workers (the pictures are a tensor in memory), and to validate always.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]

SGD = partial(torch.optim.SGD, lr=0.5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_net(classes: int = 3) -> nn.Module:
    """A convolution, a pool, dropout and a linear layer, with the same weights at every call."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, classes)
    )
    for i, parameter in enumerate(net.parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=i)
    return net


def classifier(net: nn.Module | None = None, **arguments: Any) -> Classifier:
    return Classifier(**{"net": net or small_net(), "optimizer": SGD, "schedule": constant, **arguments})


def loader(images: int = 12, batch_size: int = 2) -> DataLoader[Any]:
    labels = torch.arange(images) % 3
    return DataLoader(TensorDataset(random(images, 3, 8, 8), labels), batch_size=batch_size)


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    given = {"max_epochs": 2, "num_sanity_val_steps": 0, **arguments}
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **given,
    )


class Watch(Callback):
    """What `look` sees at the start of each training step."""

    def __init__(self, look: Callable[[Trainer, Any], Any]) -> None:
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(trainer, module))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# --- Errors


def test_errors_counted_by_hand() -> None:
    scores = torch.tensor(
        [
            [0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # 0: right
            [0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # 4: the fifth
            [0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # 5: the sixth
            [-5.0, -1.0, -4.0, -3.0, -2.0, -6.0],  # 1: right
        ]
    )
    errors = Errors()
    errors.update(scores[:3], torch.tensor([0, 4, 5]), torch.tensor([0.5, 1.0, 2.0]))
    assert errors.compute() == {"top1_error": 200 / 3, "top5_error": 100 / 3, "loss": 3.5 / 3}
    errors.update(scores[3:], torch.tensor([1]), torch.tensor([0.25]))
    assert errors.compute() == {"top1_error": 50.0, "top5_error": 25.0, "loss": 3.75 / 4}
    errors.reset()
    errors.update(scores[3:], torch.tensor([0]), torch.tensor([3.0]))
    assert errors.compute() == {"top1_error": 100.0, "top5_error": 0.0, "loss": 3.0}


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_with_five_classes_or_fewer_the_top5_error_is_0(classes: int) -> None:
    errors = Errors()
    errors.update(random(20, classes), torch.arange(20) % classes, torch.zeros(20))
    assert errors.compute()["top5_error"] == 0
    assert (errors.compute()["top1_error"] == 0) == (classes == 1)


def test_errors_do_not_depend_on_the_order_of_adding() -> None:
    scores, labels = random(500, 10), torch.arange(500) % 10
    losses = 10 * random(500, seed=1).abs()
    values = []
    for seed, batch in ((0, 1), (1, 7), (2, 64), (3, 500)):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        errors = Errors()
        for rows in order.split(batch):
            errors.update(scores[rows], labels[rows], losses[rows])
        values.append(errors.compute())
    assert values[1:] == values[:-1]  # bit for bit
    assert values[0]["loss"] == pytest.approx(float(losses.double().mean()), abs=2**-20)
    right = sum(int(scores[i].argmax()) == i % 10 for i in range(500))
    assert values[0]["top1_error"] == pytest.approx(100 - right / 5)


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [math.nan, math.inf]])
def test_a_loss_that_is_not_finite_shows(bad: list[float]) -> None:
    errors = Errors()
    for losses in ([1.0, 2.0], bad, [3.0]):
        errors.update(random(len(losses), 3), torch.zeros(len(losses), dtype=torch.long), torch.tensor(losses))
    assert math.isnan(errors.compute()["loss"])
    errors.reset()
    errors.update(random(2, 3), torch.tensor([0, 1]), torch.tensor([1e30, 0.0]))
    assert errors.compute()["loss"] == 2**20 / 2


def test_the_sum_over_ranks_is_one_metric_of_all() -> None:
    scores, labels, losses = random(30, 10), torch.arange(30) % 10, random(30, seed=1).abs()
    whole, ranks = Errors(), [Errors() for _ in range(3)]
    whole.update(scores, labels, losses)
    for rank, errors in enumerate(ranks):
        errors.update(scores[rank::3], labels[rank::3], losses[rank::3])
    merged = ranks[0]
    for state, reduce in whole._reductions.items():  # as torchmetrics does when ranks are gathered
        setattr(merged, state, reduce(torch.stack([getattr(errors, state) for errors in ranks])))  # type: ignore
    assert int(merged.count) == 30
    assert merged.compute() == whole.compute()


# --- loss and scores


def test_losses_by_the_formula() -> None:
    logits, labels = random(6, 4), torch.tensor([0, 1, 2, 3, 1, 1])
    log_p = torch.log(logits.exp() / logits.exp().sum(1, keepdim=True))
    plain = -log_p[range(6), labels]
    torch.testing.assert_close(classifier().losses(logits, labels), plain)

    smoothed = 0.9 * plain - 0.1 * log_p.mean(1)
    torch.testing.assert_close(classifier(label_smoothing=0.1).losses(logits, labels), smoothed)

    of_class = [1.0, 2.0, 0.0, 0.5]
    weighted = smoothed * torch.tensor([1.0, 2.0, 0.0, 0.5, 2.0, 2.0])
    module = classifier(label_smoothing=0.1, class_weights=of_class)
    torch.testing.assert_close(module.losses(logits, labels), weighted)
    assert "class_weights" not in module.state_dict()


def test_losses_are_computed_in_float32() -> None:
    logits = random(2, 3).bfloat16()
    assert torch.equal(
        classifier().losses(logits, torch.tensor([0, 1])), classifier().losses(logits.float(), torch.tensor([0, 1]))
    )


def test_scores_are_the_mean_of_the_softmax_over_views() -> None:
    module = classifier().eval()
    views = random(2, 5, 3, 8, 8)
    expected = torch.stack(
        [torch.stack([module(view[None])[0].softmax(0) for view in image]).mean(0) for image in views]
    )
    scores = module.scores(views)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores.sum(1), torch.ones(2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_is_a_choice(channels_last: bool) -> None:
    weight = classifier(channels_last=channels_last).net[0].weight  # type: ignore[index]
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


# --- optimizer and schedule


def test_biases_are_a_group_with_a_learning_rate_of_their_own() -> None:
    rates = Watch(lambda trainer, _: [group["lr"] for group in trainer.optimizers[0].param_groups])
    module = classifier(bias_lr=2.0)
    run = trainer(rates, max_epochs=1, limit_train_batches=1)
    run.fit(module, loader())
    (_, weight), (_, bias), (_, fc), (_, fc_bias) = module.net.named_parameters()
    groups = [{id(p) for p in group["params"]} for group in run.optimizers[0].param_groups]
    assert groups == [{id(weight), id(fc)}, {id(bias), id(fc_bias)}]
    assert rates.seen == [[0.5, 1.0]]


def test_only_what_is_trained_reaches_the_optimizer() -> None:
    module = classifier()
    module.net[0].requires_grad_(False)  # type: ignore[index]
    frozen, before = weights(module.net[0]), weights(module.net[5])  # type: ignore[index]
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    given = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert given == {id(p) for p in module.net[5].parameters()}  # type: ignore[index]
    assert torch.equal(weights(module.net[0]), frozen)  # type: ignore[index]
    assert not torch.equal(weights(module.net[5]), before)  # type: ignore[index]


def test_a_net_without_trained_biases_has_one_group() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 8, bias=False), nn.Flatten())
    run = trainer(max_epochs=1)
    run.fit(classifier(net, bias_lr=2.0), loader())
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.5]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_learning_rate_follows_the_schedule_step_by_step(accumulation: int) -> None:
    rates = Watch(lambda trainer, _: [group["lr"] for group in trainer.optimizers[0].param_groups])
    run = trainer(rates, accumulate_grad_batches=accumulation)
    run.fit(classifier(schedule=partial(cosine, warmup=0.25), bias_lr=2.0), loader())  # 2 epochs of 6 batches
    steps = 12 // accumulation
    expected = [cosine(step / steps, [], warmup=0.25) for step in range(steps) for _ in range(accumulation)]
    assert [rate for rate, _ in rates.seen] == pytest.approx([0.5 * factor for factor in expected])
    assert [rate for _, rate in rates.seen] == pytest.approx([1.0 * factor for factor in expected])
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)  # after the last step


def test_a_plateau_is_seen_in_the_validation_errors() -> None:
    """With a learning rate of 0 the error never falls: after a first epoch and one of patience, a tenth, then again."""
    factors = Watch(lambda trainer, module: module.trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0](0))
    module = classifier(optimizer=partial(torch.optim.SGD, lr=0.0), schedule=partial(plateau, patience=1))
    trainer(factors, max_epochs=5, limit_train_batches=1, num_sanity_val_steps=2).fit(module, loader(), loader())
    assert len(module.past_errors) == 5  # the sanity check is none of them
    assert len(set(module.past_errors)) == 1
    assert factors.seen == pytest.approx([1, 1, 0.1, 0.01, 0.01])


# --- chance


def trained(global_seed: int, **arguments: Any) -> Tensor:
    torch.manual_seed(global_seed)
    module = classifier(**arguments)
    trainer().fit(module, loader())
    return weights(module)


def test_dropout_is_a_function_of_the_seed_and_of_nothing_else() -> None:
    first = trained(1)
    assert torch.equal(first, trained(2))
    assert not torch.equal(first, trained(1, seed=1))


def test_dropout_is_drawn_from_seed_rank_and_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, rank: int, number: int) -> float:
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=number))
        monkeypatch.setattr(Classifier, "trainer", SimpleNamespace(fit_loop=loop, global_rank=rank))
        classifier(seed=seed).on_train_batch_start(None, 0)
        return torch.rand(1).item()

    places = [(seed, rank, number) for seed in (0, 1, 7) for rank in (0, 1, 8) for number in (0, 1, 1000)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    drawn(2**32 - 1, 1023, 2**33)  # the largest of each


def test_micro_batches_are_numbered_over_all_epochs() -> None:
    seeds = Watch(lambda trainer, _: trainer.fit_loop.epoch_loop.total_batch_idx)
    trainer(seeds, accumulate_grad_batches=2).fit(classifier(), loader())
    assert seeds.seen == list(range(12))


# --- what is reported


def test_training_and_validation_report_what_they_counted() -> None:
    module = classifier(optimizer=partial(torch.optim.SGD, lr=0.0), val_sizes=(224, 180))
    run = trainer(max_epochs=1)
    run.fit(module, loader(), [loader(), loader(images=4)])
    named = {name: float(value) for name, value in run.callback_metrics.items()}
    kinds = ("top1_error", "top5_error", "loss")
    names = [f"train/{k}" for k in kinds] + [f"val/{k}" for k in kinds] + [f"val/{k}_180" for k in kinds]
    assert sorted(named) == sorted(names)

    images, labels = loader().dataset.tensors  # type: ignore[attr-defined]
    logits = module.eval()(images)
    wrong = (logits.argmax(1) != labels).float()
    assert named["val/top1_error"] == pytest.approx(100 * float(wrong.mean()))
    assert named["val/top1_error_180"] == pytest.approx(100 * float(wrong[:4].mean()))
    assert named["val/loss"] == pytest.approx(float(module.losses(logits, labels).mean().detach()), abs=1e-5)
    assert module.past_errors == [pytest.approx(named["val/top1_error"])]


def test_a_test_averages_views_and_keeps_the_scores_of_every_row() -> None:
    module = classifier().eval()
    views, labels, rows = random(6, 2, 3, 8, 8), torch.arange(6) % 3, torch.tensor([9, 4, 7, 1, 0, 3])
    run = trainer()
    run.test(module, DataLoader(TensorDataset(views, labels, rows), batch_size=4), verbose=False)
    with torch.no_grad():
        expected = torch.cat([module.scores(views[:4]), module.scores(views[4:])])
    assert set(module.test_scores) == set(rows.tolist())
    for row, label, scores in zip(rows.tolist(), labels.tolist(), expected, strict=True):
        assert module.test_scores[row][0] == label
        assert torch.equal(module.test_scores[row][1], scores)  # the bits
        assert module.test_scores[row][1].untyped_storage().nbytes() == 4 * len(scores)  # alone, and not of its batch
    wrong = (expected.argmax(1) != labels).float().mean()
    assert float(run.callback_metrics["test/top1_error"]) == pytest.approx(100 * float(wrong))
    loss = -expected[range(6), labels].log().mean()
    assert float(run.callback_metrics["test/loss"]) == pytest.approx(float(loss), abs=1e-5)


def test_every_view_counts_alike_whatever_batch_it_comes_in() -> None:
    module = classifier().eval()
    labels, numbers = torch.arange(4) % 3, (6, 18, 1)
    passes = [random(4, number, 3, 8, 8, seed=i) for i, number in enumerate(numbers)]
    order = ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0])
    batches = [
        (views[half], labels[half], torch.tensor(half) + 10)
        for views, turn in zip(passes, order, strict=True)
        for half in (turn[:2], turn[2:])
    ]
    run = trainer()
    for _ in range(2):  # a second test begins anew
        run.test(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
        with torch.no_grad():
            each = [module(view[None])[0].softmax(0) for i in range(4) for views in passes for view in views[i]]
        expected = torch.stack(each).view(4, sum(numbers), 3).mean(1)
        for row in range(4):
            label, scores = module.test_scores[10 + row]
            assert label == labels[row]
            torch.testing.assert_close(scores, expected[row], rtol=0, atol=1e-6)
        # Errors are those of the averaged scores, each image once, and not means over batches.
        wrong = (expected.argmax(1) != labels).float().mean()
        assert float(run.callback_metrics["test/top1_error"]) == pytest.approx(100 * float(wrong))
        loss = -expected[range(4), labels].log().mean()
        assert float(run.callback_metrics["test/loss"]) == pytest.approx(float(loss), abs=1e-5)


def test_windows_are_those_of_each_image() -> None:
    net = sppnet("tiny", 3, width=0.25)
    module = classifier(net).eval()
    views = random(4, 2, 3, 48, 64)
    windows = torch.tensor([[0, 0, 0, 32, 32], [1, 16, 32, 48, 64], [0, 8, 16, 40, 48]])
    with torch.no_grad():
        expected = torch.stack([net.forward_windows(image, windows).softmax(1) for image in views])  # (4, 3, 3)
        assert module.scores_of_views(views, windows).shape == (4, 3, 3)
        torch.testing.assert_close(module.scores_of_views(views, windows), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(module.scores(views, windows), expected.mean(1), rtol=0, atol=1e-6)


# --- checkpoints


def test_a_checkpoint_holds_plain_data_and_the_past_errors(tmp_path: Path) -> None:
    path, identity = tmp_path / "a.ckpt", {"classes": ["a", "b", "c"], "region": 224}
    module = classifier(identity=identity)
    run = trainer()
    run.fit(module, loader(), loader())
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    assert state["spp_cls"] == {
        "identity": identity,
        "past_errors": module.past_errors,
        "train_errors": [0] * 5,  # no epoch is under way
    }
    assert len(module.past_errors) == 2
    assert set(state["state_dict"]) == {f"net.{name}" for name in module.net.state_dict()}

    again = classifier()
    trainer(max_epochs=3).fit(again, loader(), loader(), ckpt_path=path)
    assert again.past_errors[:2] == module.past_errors
    assert len(again.past_errors) == 3
    uninterrupted = classifier()
    trainer(max_epochs=3).fit(uninterrupted, loader(), loader())
    assert torch.equal(weights(again), weights(uninterrupted))
    assert again.past_errors == uninterrupted.past_errors


# The loader of this test begins anew: only the number of images counts here.
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_inside_an_epoch_the_training_errors_go_on(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 9:  # three of the six batches of the second epoch
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def counts() -> Watch:
        return Watch(lambda trainer, module: (trainer.global_step, int(module.train_errors.count)))

    whole, resumed = counts(), counts()
    trainer(whole, Save()).fit(classifier(), loader())
    trainer(resumed).fit(classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert whole.seen == [(step, 2 * (step % 6)) for step in range(12)]
    assert resumed.seen == whole.seen[9:]
    sums = torch.load(tmp_path / "a.ckpt", weights_only=True)["spp_cls"]["train_errors"]
    assert sums[0] == 6


def test_sums_of_errors_and_back() -> None:
    one, other = Errors(), Errors()
    one.update(random(9, 10), torch.arange(9), random(9).abs())
    other.go_on_from(one.sums())
    for errors in (one, other):
        errors.update(random(7, 10, seed=1), torch.arange(7), random(7, seed=1).abs())
    assert one.compute() == other.compute()


def test_a_checkpoint_without_our_part_leaves_no_errors() -> None:
    module = classifier()
    module.past_errors = [50.0]
    module.on_load_checkpoint({})
    assert module.past_errors == []
