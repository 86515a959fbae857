"""`spp evaluate`: each number is counted again from the scores, and some scores from the pixels."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Spp, call_spp
from omegaconf import OmegaConf
from PIL import Image

from spp_cls import build
from spp_cls.evaluate import confusion_matrix, draw_confusion_matrix, errors, per_class


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """Another run on the same pictures."""
    folder = tmp_path_factory.mktemp("second")
    assert call_spp("train", *small, "seed=1", "trainer.max_epochs=1", "test=false", cwd=folder).code == 0
    (found,) = (folder / "runs" / "folder-tiny").iterdir()
    return found


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    return json.loads((folder / "results.json").read_text()), np.load(folder / "scores.npz")


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def resized(path: Path, shorter: int = 36) -> torch.Tensor:
    """(3, h, w) in grey levels, the shorter side `shorter` px."""
    image = Image.open(path).convert("RGB")
    scale = shorter / min(image.size)
    shape = [max(shorter, round(side * scale)) for side in reversed(image.size)]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, shape, mode="bilinear", antialias=True)[0].float()


def softmax_of(net: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.inference_mode():
        return net(((pixels - mean[:, None, None]) / std[:, None, None])[None]).softmax(-1)[0]


# Numbers by hand

SCORES = np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], np.float32)
LABELS = np.array([0, 0, 1, 1, 0])


def test_errors_by_hand() -> None:
    assert errors(LABELS, SCORES)["top1_error"] == pytest.approx(40)
    assert errors(LABELS, SCORES)["top5_error"] == 0
    ten = np.eye(10, dtype=np.float32)[[0] * 4] + np.linspace(0.1, 0, 10, dtype=np.float32)
    assert errors(np.array([0, 4, 5, 9]), ten) == {"top1_error": 75, "top5_error": 50}


def test_the_matrix_and_the_table_by_hand() -> None:
    matrix = confusion_matrix(LABELS, SCORES)
    assert matrix.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert per_class(matrix, ["a", "b", "c"]) == [
        {"class": "a", "images": 3, "top1_error": 33.33, "precision": 100, "taken_for": "b"},
        {"class": "b", "images": 2, "top1_error": 50, "precision": 50, "taken_for": "c"},
        {"class": "c", "images": 0, "top1_error": None, "precision": 0, "taken_for": None},
    ]


def test_the_drawing_is_xml_whatever_the_classes_are_called() -> None:
    text = draw_confusion_matrix(confusion_matrix(LABELS, SCORES), ["<script>alert(1)</script>", "a & b", '"c"'])
    assert "<script" not in text
    svg = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert [node.text for node in svg.iter(f"{space}text")][::2] == ["<script>alert(1)</script>", "a & b", '"c"']
    titles = [node.text for node in svg.iter(f"{space}title")]
    assert len(titles) == 9
    assert titles[:2] == [
        "<script>alert(1)</script> → <script>alert(1)</script>: 2",
        "<script>alert(1)</script> → a & b: 1",
    ]


# A run, tested


def test_the_centre_crop_says_what_the_run_said(spp: Spp, run: Path, tmp_path: Path, pictures: Path) -> None:
    answer = spp("evaluate", f"run={run}")
    assert answer.code == 0, answer.err
    folder = run / "evaluations" / "test_center_crop_32"
    found, file = read(folder)
    assert f"all of it: {folder}" in answer.out
    of_run = json.loads((run / "results.json").read_text())
    assert found["top1_error"] == pytest.approx(of_run["test/top1_error"])
    assert found["top5_error"] == of_run["test/top5_error"] == 0
    assert (found["images"], found["size"], found["views"], found["checkpoints"]) == (
        9,
        32,
        "center_crop",
        ["last.ckpt"],
    )

    scores, labels = file["scores"], file["labels"]
    assert 100 * (scores.argmax(1) != labels).mean() == pytest.approx(found["top1_error"])
    assert np.allclose(scores.sum(1), 1, atol=1e-6)
    names = sorted(str(path.relative_to(pictures)) for path in pictures.glob("test/*/*.jpg"))
    assert file["paths"].tolist() == names  # each once
    assert [file["classes"][label] for label in labels] == [name.split("/")[1] for name in names]

    matrix = np.array([list(row.values())[1:] for row in table(folder / "confusion_matrix.csv")], int)
    assert matrix.tolist() == confusion_matrix(labels, scores).tolist() and matrix.sum() == 9
    rows = table(folder / "per_class.csv")
    assert [row["class"] for row in rows] == ["a", "b", "c"] and {row["images"] for row in rows} == {"3"}
    wrong = [100 * (1 - matrix[k, k] / 3) for k in range(3)]
    assert [float(row["top1_error"]) for row in rows] == pytest.approx(wrong, abs=0.01)
    ET.parse(folder / "confusion_matrix.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing else is left


def test_ten_crops_are_the_mean_of_ten_by_hand(spp: Spp, run: Path, pictures: Path) -> None:
    assert spp("evaluate", f"run={run}", "views=ten_crop").code == 0
    _, file = read(run / "evaluations" / "test_ten_crop_32")
    net = build.load_classifier(run / "checkpoints" / "last.ckpt").net
    for i in (0, 7):
        image = resized(pictures / str(file["paths"][i]))
        down, right = image.shape[1] - 32, image.shape[2] - 32
        places = [(round(down / 2), round(right / 2)), (0, 0), (0, right), (down, 0), (down, right)]
        crops = [image[:, y : y + 32, x : x + 32] for y, x in places]
        mean = torch.stack([softmax_of(net, crop) for crop in [*crops, *(crop.flip(2) for crop in crops)]]).mean(0)
        assert np.allclose(file["scores"][i], mean, atol=1e-5)


@pytest.mark.parametrize("size", [32, 26])
def test_the_96_views_as_crops_by_hand(spp: Spp, run: Path, pictures: Path, size: int) -> None:
    assert spp("evaluate", f"run={run}", "views=multi_scale_pixels", f"views.size={size}").code == 0
    found, file = read(run / "evaluations" / f"test_multi_scale_pixels_{size}")
    assert (found["images"], found["views"], found["size"]) == (9, "multi_scale_pixels", size)
    net = build.load_classifier(run / "checkpoints" / "last.ckpt").net
    for i in (0, 4):
        crops = []
        for scale in (224, 256, 300, 360, 448, 560):
            image = resized(pictures / str(file["paths"][i]), round(scale * size / 224))
            down, right = image.shape[1] - size, image.shape[2] - size
            for y in {0, round(down / 2), down}:
                for x in {0, round(right / 2), right}:
                    crop = image[:, y : y + size, x : x + size]
                    crops += [crop, crop.flip(2)]
        assert len(crops) == 96
        assert np.allclose(file["scores"][i], torch.stack([softmax_of(net, crop) for crop in crops]).mean(0), atol=1e-5)


@pytest.mark.slow
def test_views_on_maps_are_close_to_those_on_pixels(spp: Spp, run: Path) -> None:
    scores = {}
    for views in ("ten_crop", "ten_crop_maps", "multi_scale_pixels", "multi_scale", "multi_scale_full"):
        answer = spp("evaluate", f"run={run}", f"views={views}")
        assert answer.code == 0, answer.err
        assert f"test error of 9 images ({views}, 32 px)" in answer.out
        _, file = read(run / "evaluations" / f"test_{views}_32")
        assert np.allclose(file["scores"].sum(1), 1, atol=1e-5) and len(file["paths"]) == 9
        scores[views] = file["scores"]
    # At 32 px padding is a large part of a crop; found are 0.017 and 0.007.
    assert np.abs(scores["ten_crop"] - scores["ten_crop_maps"]).max() < 0.04
    assert np.abs(scores["multi_scale_pixels"] - scores["multi_scale"]).max() < 0.04
    # 98 views are 96 and two: what is left are the scores of the full image and its mirror image.
    two = (98 * scores["multi_scale_full"] - 96 * scores["multi_scale"]) / 2
    assert np.allclose(two.sum(1), 1, atol=1e-4) and (two > -1e-4).all()


def test_full_images_at_their_own_shape_by_hand(spp: Spp, run: Path, pictures: Path) -> None:
    assert spp("evaluate", f"run={run}", "views=full_image", "batch_size=4").code == 0
    found, file = read(run / "evaluations" / "test_full_image_32")
    assert found["images"] == 9
    net = build.load_classifier(run / "checkpoints" / "last.ckpt").net
    by_hand = [softmax_of(net, resized(pictures / str(path))) for path in file["paths"]]
    assert np.allclose(file["scores"], torch.stack(by_hand), atol=1e-5)


@pytest.mark.slow
def test_eight_crops_and_two_full_views_by_hand(spp: Spp, run: Path, pictures: Path) -> None:
    assert spp("evaluate", f"run={run}", "views=eight_crop_full").code == 0
    _, file = read(run / "evaluations" / "test_eight_crop_full_32")
    net = build.load_classifier(run / "checkpoints" / "last.ckpt").net
    for path, scores in zip(file["paths"], file["scores"], strict=True):
        whole = resized(pictures / str(path))
        bottom, right = whole.shape[1] - 32, whole.shape[2] - 32
        views = [whole[:, y : y + 32, x : x + 32] for y in (0, bottom) for x in (0, right)] + [whole]
        by_hand = [softmax_of(net, view) for each in views for view in (each, each.flip(2))]
        assert np.allclose(scores, torch.stack(by_hand).mean(0), atol=1e-5)


def test_another_checkpoint_split_and_size(spp: Spp, run: Path, tmp_path: Path) -> None:
    assert spp("evaluate", f"run={run}", "ckpt=best", "split=val").code == 0
    found, file = read(run / "evaluations" / "val_center_crop_32_best")
    assert (found["checkpoints"], found["split"]) == (["best.ckpt"], "val")
    assert all(path.startswith("val/") for path in file["paths"])
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    (best,) = (value for key, value in state.items() if key.startswith("ModelCheckpoint"))
    assert found["top1_error"] == pytest.approx(float(best["best_model_score"]))

    checkpoint = run / "checkpoints" / "best.ckpt"
    words = [f"run={checkpoint}", "split=val", "views.size=26", f"output={tmp_path / 'here'}"]
    assert spp("evaluate", *words).code == 0
    found, _ = read(tmp_path / "here")
    assert (found["checkpoints"], found["size"]) == (["best.ckpt"], 26)


def test_several_runs_are_averaged(spp: Spp, run: Path, second: Path, tmp_path: Path) -> None:
    for each in (run, second):
        assert spp("evaluate", f"run={each}", f"output={tmp_path / each.parent.name}").code == 0
    answer = spp("evaluate", f"run=[{run},{second}]")
    assert answer.code == 0, answer.err
    (folder,) = (tmp_path / "runs" / "evaluate").iterdir()
    found, file = read(folder)
    alone = [read(tmp_path / each.parent.name)[1]["scores"] for each in (run, second)]
    assert not np.allclose(*alone)
    assert np.allclose(file["scores"], (alone[0] + alone[1]) / 2, atol=1e-7)
    assert found["runs"] == [str(run), str(second)]
    assert found["top1_error"] == pytest.approx(errors(file["labels"], file["scores"])["top1_error"])


def test_pictures_that_have_moved_and_others(spp: Spp, run: Path, second: Path, pictures: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    config = OmegaConf.load(run / "config.yaml")
    config.data.root = str(tmp_path / "gone")
    OmegaConf.save(config, run / "config.yaml")
    answer = spp("evaluate", f"run={run}")
    assert answer.code == 2 and f"{tmp_path / 'gone'}: does not exist" in answer.err
    assert spp("evaluate", f"run={run}", f"root={moved}").code == 0
    assert [path.name for path in (run / "evaluations").iterdir()] == ["test_center_crop_32_moved"]

    # Other test pictures cannot be averaged with the first run's.
    (moved / "test" / "a" / "00.jpg").unlink()
    config.data.root = str(moved)
    OmegaConf.save(config, run / "config.yaml")
    answer = spp("evaluate", f"run=[{second},{run}]")
    assert answer.code == 2
    assert answer.err.splitlines()[-1] == f"spp evaluate: run={run}: its test pictures are not those of {second}"
    assert not (tmp_path / "runs").exists()

    for part in ("train", "val", "test"):
        (moved / part / "a").rename(moved / part / "z")
    answer = spp("evaluate", f"run={run}")
    assert answer.code == 2
    assert f"{moved}: its 3 classes are not the 3 that {run / 'checkpoints' / 'last.ckpt'} was trained on" in answer.err


# Refused


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["batch_norm=recalibrated"], "batch_norm=recalibrated: this net has no batch norm; use batch_norm=shared"),
        (["batch_norm=new"], "batch_norm=new: use shared or recalibrated"),
        (["split=tset"], "split='tset': "),
        (["ckpt=first"], "first.ckpt does not exist; the run has saved no 'first' checkpoint"),
        (["views=nine_crop"], "views=nine_crop: there is no views of that name; did you mean ten_crop?"),
        (["views=eight_crop_full", "views.size=3"], "views.size: the net does not take images of 3 px"),
        (["data.region=224"], "data.region: there is no such key"),  # the run's own is used
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(spp: Spp, run: Path, words: list[str], line: str) -> None:
    answer = spp("evaluate", f"run={run}", *words)
    assert (answer.code, answer.out) == (2, "")
    assert line in answer.err and answer.err.count("\n") == 1, answer.err
    assert not (run / "evaluations").exists()


@pytest.mark.slow
def test_a_net_whose_maps_have_no_windows_is_refused_before_any_test(
    spp: Spp, small: list[str], pictures: Path, tmp_path: Path
) -> None:
    words = [*small, "model.pool=average", "trainer.max_epochs=1", "test=false"]
    assert spp("train", *words, "views=ten_crop").code == 0
    (run,) = (tmp_path / "runs" / "folder-tiny").iterdir()
    line = r"^spp {}: views.crops=multi_scale pools windows of maps: .*average.*; use views=ten_crop\n$"
    for verb, more in (("evaluate", []), ("predict", [pictures / "test" / "a" / "00.jpg"])):
        answer = spp(verb, f"run={run}", "views=multi_scale", *more)
        assert (answer.code, answer.out) == (2, "") and re.match(line.format(verb), answer.err), answer.err
    assert not (run / "evaluations").exists()
    assert spp("evaluate", f"run={run}", "views=multi_scale_pixels").code == 0


def test_a_run_that_is_not_there(spp: Spp, tmp_path: Path) -> None:
    answer = spp("evaluate", "run=nope")
    assert answer.code == 2
    assert answer.err.startswith("spp evaluate: run=nope does not exist; name a folder that spp train made")


def test_a_run_of_somebody_else_cannot_run_commands(spp: Spp, run: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    config.data.layout = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    OmegaConf.save(config, run / "config.yaml")
    refused = (
        f"{run / 'config.yaml'} would build os.system, which is not part of spp_cls; add trust=true if you trust it"
    )
    assert spp("evaluate", f"run={run}") == (2, "", f"spp evaluate: {refused}\n")
    assert spp("predict", f"run={run}", run / "config.yaml") == (2, "", f"spp predict: {refused}\n")
    assert not (tmp_path / "ran").exists()
