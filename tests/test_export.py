"""`spp export`: the file of a run gives what the run gives, says what it is, and needs nothing of ours to be used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import Spp, call_spp
from torch import nn

from spp_cls import __version__, build, export, portable
from spp_cls.models import bins
from spp_cls.portable import clouds, shapes_to_try

SCRIPT = Path(__file__).parent.parent / "scripts" / "classify_onnx.py"


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its file of ONNX; to be read, never to be written to."""
    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trained, run)
    answer = call_spp("export", "run=run", cwd=run.parent)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("run/exports/last.onnx: ") and "sides of 17 to 2048 px" in answer.out
    assert [path.name for path in (run / "exports").iterdir()] == ["last.onnx"]
    return run


def session_of(run: Path) -> Any:
    return onnxruntime.InferenceSession(run / "exports" / "last.onnx", providers=["CPUExecutionProvider"])


def test_onnx_gives_what_the_net_gives(exported: Path) -> None:
    session = session_of(exported)
    classifier = build.load_classifier(exported / "checkpoints" / "last.ckpt")
    mean, std = (torch.tensor(classifier.identity[name]).view(3, 1, 1) for name in ("mean", "std"))
    sizes = [(17, 17), (17, 18), (500, 17), (17, 500), (18, 33), (32, 32), (224, 224), (180, 251)]
    shapes = [(1 + i % 3, *size) for i, size in enumerate(sizes)] + shapes_to_try(17, 300, number=40, seed=9)
    for seed, shape in enumerate(shapes):
        pixels = clouds(shape, seed)
        with torch.inference_mode():
            expected = classifier.net((pixels.float() - mean) / std)
            scores = classifier.scores(((pixels.float() - mean) / std)[:, None])
        logits, probabilities = (torch.from_numpy(out) for out in session.run(None, {"pixels": pixels.numpy()}))
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max(), shape
        torch.testing.assert_close(probabilities, scores, rtol=1e-5, atol=1e-6)


def test_the_file_says_what_it_is(exported: Path) -> None:
    session = session_of(exported)
    (pixels,), outputs = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", 3, "height", "width"])
    assert [(out.name, out.shape) for out in outputs] == [("logits", ["batch", 3]), ("probabilities", ["batch", 3])]
    said = json.loads(session.get_modelmeta().custom_metadata_map["spp_cls"])
    results = json.loads((exported / "results.json").read_text())
    assert said == {
        "spp_cls": __version__,
        "classes": ["a", "b", "c"],
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "resize": 36,
        "region": 32,
        "views": {"crops": "center_crop", "size": 32},
        "smallest_size": 17,
        "largest_size": 2048,
        "results": {k: v for k, v in results.items() if k.startswith(("val/", "test/"))},
    }
    assert "test/top1_error" in said["results"]
    assert str(SCRIPT.parent.parent).encode() not in (exported / "exports" / "last.onnx").read_bytes()


@pytest.mark.parametrize(("options", "views"), [([], "center_crop"), (["--full-image"], "full_image")])
def test_the_script_says_what_predict_says_without_torch(
    spp: Spp, exported: Path, pictures: Path, options: list[str], views: str
) -> None:
    paths = sorted((pictures / "test").glob("*/*.jpg"))
    words = [str(word) for word in (exported / "exports" / "last.onnx", *paths, *options)]
    code = f"import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "; assert not {'torch', 'spp_cls'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = spp("predict", f"run={exported}", f"views={views}", "format=jsonl", *paths)
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert len({row["probability"] for row in rows}) == len(rows) == 9
    for line, row in zip(done.stdout.splitlines(), rows, strict=True):
        path, said = line.split("  ")
        name, _, probability = said.partition(" ")
        assert path == row["path"]
        # Pillow's pixels are within two grey levels.
        assert row["top"][name] == pytest.approx(row["probability"], abs=0.002)
        assert float(probability.rstrip("%")) / 100 == pytest.approx(row["probability"], abs=0.002)


@pytest.mark.parametrize("words", [[], ["nope.onnx", "a.jpg"], ["FILE"], ["FILE", "nope.jpg"], ["FILE", "text.jpg"]])
def test_the_script_answers_mistakes_in_a_line(exported: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    words = [str(exported / "exports" / "last.onnx") if word == "FILE" else word for word in words]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, cwd=tmp_path)
    usage, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert usage.startswith("usage: ") and line.startswith("classify_onnx.py: error: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["format=tf"], "format=tf: use one of onnx, torch, aoti"),
        (["output=net.pt2"], "output=net.pt2: format=onnx is a file *.onnx"),
        (["format=torch", "output=net.onnx"], "output=net.onnx: format=torch is a file *.pt2"),
        (["smallest=16"], "smallest=16: the net takes sides of 17 px or more"),
        (["largest=48"], "largest=48: give 49 px or more; the smallest side is 17"),
        (["ckpt=frist"], "frist.ckpt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(spp: Spp, exported: Path, tmp_path: Path, words: list[str], line: str) -> None:
    answer = spp("export", f"run={exported}", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.count("\n") == 1 and line in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_refused_and_leaves_nothing(
    spp: Spp, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise = portable.normalise
    monkeypatch.setattr(portable, "shapes_to_try", lambda *limits: shapes_to_try(*limits, number=8))
    monkeypatch.setattr(portable, "normalise", lambda pixels, mean, std: normalise(pixels, [m + 1 for m in mean], std))
    answer = spp("export", f"run={exported}", "format=torch", "output=deep/net.pt2", "largest=200")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("spp export: deep/net.pt2 is refused: at ") and answer.err.count("\n") == 1
    assert list((tmp_path / "deep").iterdir()) == []


def test_rules_for_study_are_refused(spp: Spp, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = build.load_classifier(exported / "checkpoints" / "last.ckpt")
    classifier.net.pyramid.bins = bins.window
    monkeypatch.setattr(build, "load_classifier", lambda *_: classifier)
    answer = spp("export", f"run={exported}")
    assert answer.code == 2 and answer.err.startswith("spp export: model.bins=window: ")


def test_the_smallest_size_of_a_net_of_ones_own_must_be_given() -> None:
    with pytest.raises(ValueError, match="^smallest=null: .* give px, like smallest=64$"):
        export.limits(nn.Conv2d(3, 2, 1), None, 2048)
    assert export.limits(nn.Conv2d(3, 2, 1), 5, 2048) == (5, 2048)
