"""`spp report`: pages of run folders written by hand; what they show, and that nothing gets out of them or in."""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import Spp
from fake_runs import config_with, history, write_answers, write_lines, write_run
from PIL import Image

from spp_cls.records import read_record
from spp_cls.report import answers_of, changed_together, page, what_mattered

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "input"}


class Reader(HTMLParser):
    """Fails where an element is not closed in its turn; keeps texts, attributes and elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def titles(self) -> list[str]:
        """Of the charts."""
        return [str(each["aria-label"]) for each in self.all("svg")]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with answers on four pictures of two classes, two of them wrong; one of these pictures is not there."""
    folder = write_run(tmp_path / "runs" / "one")
    scores = [[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.01, 0.99]]
    write_answers(folder, [0, 1, 1, 0], scores, ["cat", EVIL], ["a.jpg", "b/<b>.png", "c.jpg", "gone.jpg"])
    (tmp_path / "pictures" / "b").mkdir(parents=True)
    Image.new("RGBA", (640, 320), (255, 0, 0, 255)).save(tmp_path / "pictures" / "b" / "<b>.png")
    return folder


# One run


def test_a_page_of_one_run(spp: Spp, run: Path) -> None:
    answer = spp("report", "runs/one")
    assert answer.code == 0 and re.fullmatch(r"runs/one/report.html \(1 run, 0\.\d MB, [\d.]+ s\)\n", answer.out)
    found = read(run / "report.html")
    assert found.titles() == [
        *("Top-1 error by epoch", "Loss by epoch", "Training loss by step; its range behind", "Learning rate"),
        *("Speed", "Wait for data", "Memory", "Top-1 error by test size", "confusion matrix"),
    ]
    curves = [each["data-name"] for each in found.all("path") if "data-name" in each]
    assert curves[:6] == [
        "train, 180 px",
        "train, 224 px",
        "val/top1_error",
        "train, 180 px",
        "train, 224 px",
        "val/loss",
    ]
    said = " ".join(found.texts)
    for word in (
        "a processor",
        "abc123",
        "spp train name=fake",
        "2.15.0",
        "evaluations/test_center_crop_224",
        "4 of 4",
    ):
        assert word in said, word


def test_mistakes_are_the_surest_first_and_their_pictures_small_jpegs(spp: Spp, run: Path) -> None:
    assert spp("report", run).code == 0
    found = read(run / "report.html")
    captions = re.findall(r"<p>(<b>.*?)</p>", (run / "report.html").read_text())
    assert captions == [
        "<b>&lt;script&gt;alert(1)&lt;/script&gt;</b> 99 %, is cat<small>gone.jpg</small>",
        "<b>cat</b> 70 %, is &lt;script&gt;alert(1)&lt;/script&gt;<small>b/&lt;b&gt;.png</small>",
    ]
    assert "not there" in found.texts
    ((picture,),) = [each.values() for each in found.all("img") if each.pop("alt") == ""]
    with Image.open(BytesIO(b64decode(str(picture).removeprefix("data:image/jpeg;base64,")))) as image:
        assert (image.format, image.size) == ("JPEG", (160, 80))


def test_no_picture_from_outside_the_data_set_is_shown(spp: Spp, run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    write_answers(
        run.with_name("two"), [1, 1], [[1, 0], [1, 0]], ["a", "b"], ["../secret.png", str(tmp_path / "secret.png")]
    )
    (run / "evaluations").rename(run / "old")
    run.with_name("two").joinpath("evaluations").rename(run / "evaluations")
    assert spp("report", run).code == 0
    assert read(run / "report.html").all("img") == []


def test_names_are_text_and_nothing_is_asked_of_anybody(spp: Spp, run: Path) -> None:
    config = config_with(name=EVIL, model__name=f'"{EVIL}', tags=["https://example.org"])
    (run / "config.yaml").write_text(json.dumps(config, indent=1))
    write_lines(run / "events.jsonl", [{"event": EVIL, "time": EVIL}])
    for words in (["report", run], ["report", run, write_run(run.with_name(EVIL.replace("/", "_")), config)]):
        assert spp(*words, "output=page.html").code == 0
        text = (run.parents[1] / "page.html").read_text()
        found = Reader(text)
        (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        assert len(found.all("script")) == 1 and "alert" not in script
        policy = next(each["content"] for each in found.all("meta") if "http-equiv" in each)
        allowed = b64encode(sha256(script.encode()).digest()).decode()
        assert policy == (
            f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
        )
        for tag, attributes in found.elements:
            assert tag not in ("link", "iframe", "object", "embed", "base", "form", "a")
            assert not any(name.startswith("on") for name in attributes), attributes
            assert attributes.get("src", "data:").startswith("data:"), attributes
        assert re.findall(r"https?://\S*|url\(", text.replace("https://example.org", "")) == []
        assert EVIL in " ".join(found.texts)


def test_without_answers_it_says_how_to_get_them(spp: Spp, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert spp("report", folder).code == 0
    said = " ".join(read(folder / "report.html").texts)
    assert f"Classes, confusions and mistakes are known after: spp evaluate run={folder}" in said
    (folder / "scores").mkdir()  # as keep_scores leaves them
    np.savez(folder / "scores" / "x.npz", labels=np.array([0, 1]), scores=np.array([[0, 1], [0, 1]], np.float16))
    assert spp("report", folder).code == 0
    found = read(folder / "report.html")
    assert "confusion matrix" in found.titles() and "class 1" in found.texts
    assert f"Which pictures they are is known after: spp evaluate run={folder}" in found.texts


def test_answers_that_are_no_answers_are_passed_over(run: Path) -> None:
    found = answers_of(run)
    assert found is not None and found.classes == ("cat", EVIL) and found.source.endswith("scores.npz")
    path = run / "evaluations" / "test_center_crop_224" / "scores.npz"
    for damage in (b"", b"PK\x03\x04", path.read_bytes()[:200]):
        path.write_bytes(damage)
        assert answers_of(run) is None
    np.savez(path, labels=np.array([5]), scores=np.ones((1, 2)), classes=np.array(["a", "b"]), paths=np.array(["x"]))
    assert answers_of(run) is None  # a label that no class has
    np.savez(path, labels=np.array([0]), scores=np.ones(2))
    assert answers_of(run) is None
    np.savez(path, labels=np.array([{}], dtype=object), scores=np.ones((1, 2)))
    assert answers_of(run) is None  # what numpy would have to unpickle


def test_training_sizes_that_mix_in_an_epoch_and_many_of_them(spp: Spp, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = history(2, 40)
    for i, row in enumerate(row for row in rows if "size" in row):
        row["size"] = 100 + i % 20
    write_lines(folder / "history.jsonl", rows)
    assert spp("report", folder).code == 0
    curves = [str(each["data-name"]) for each in read(folder / "report.html").all("path") if "data-name" in each]
    assert "train, all sizes" in curves
    groups = ["100 to 103", "104 to 107", "108 to 110", "111 to 113", "114 to 116", "117 to 119"]
    assert [name for name in curves if " to " in name] == [f"train, {group} px" for group in groups]


def test_a_run_that_has_hardly_begun(spp: Spp, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    assert spp("report", folder).code == 0
    assert read(folder / "report.html").titles() == []


def test_a_long_run_keeps_its_spike(spp: Spp, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = history(100, 1000)
    next(row for row in rows if row["step"] == 54_321)["loss"] = 1e6
    write_lines(folder / "history.jsonl", rows)
    assert spp("report", folder).code == 0
    found = read(folder / "report.html")
    paths = [str(each["d"]) for each in found.all("path") if str(each.get("class")).startswith(("line", "band"))]
    assert max(path.count("L") for path in paths) < 800  # a band has the points of two curves
    (by_step,) = [each for each in found.all("svg") if str(each["aria-label"]).startswith("Training loss")]
    assert float(str(by_step["data-y"]).split()[1]) >= 1e6
    assert (folder / "report.html").stat().st_size < 500_000


# Several


@pytest.fixture
def grid(tmp_path: Path) -> list[Path]:
    """Nine runs of three rates and three seeds, whose error is ten times the rate's rank and a little by the seed."""
    rates = (0.001, 0.01, 0.1)
    return [
        write_run(
            tmp_path / "multiruns" / "x" / f"{3 * i + seed}",
            config_with(optimizer__lr=rate, seed=seed),
            10.0 * i + seed,
        )
        for i, rate in enumerate(rates)
        for seed in range(3)
    ]


def test_a_page_of_a_grid(spp: Spp, grid: list[Path], tmp_path: Path) -> None:
    answer = spp("report", "multiruns/x")
    (output,) = (tmp_path / "reports").glob("*.html")
    assert answer.code == 0 and answer.out.startswith(f"reports/{output.name} (9 runs, ")
    found = read(output)
    assert found.titles() == [
        *("val/top1_error by epoch", "train/top1_error by epoch", "train/loss by epoch"),
        *("Top-1 error by test size, center_crop", "parallel coordinates", "lr", "seed"),
    ]
    heads = found.texts[found.texts.index("run") :][:10]
    assert heads == [
        *("run", "state", "epochs", "val/top1_error", "seed", "lr", "test/top1_error", "center_crop@180"),
        *("center_crop@224", "training, s"),
    ]
    assert sum("data-run" in each for each in found.all("tr")) == 9
    said = " ".join(found.texts)
    assert "0.00, 0" in said and "optimizer._target_: torch.optim.AdamW" in said  # the best; what all share
    colours = [
        str(each["class"]) for each in found.all("path") if each.get("data-run") == "4" and "line" in str(each["class"])
    ]
    assert set(colours[:4]) == {"line c4 d0"}


def test_stable_colours_where_runs_are_added(grid: list[Path], tmp_path: Path) -> None:
    def looks(folders: list[Path]) -> dict[str, str]:
        text = page([read_record(folder) for folder in folders], "val/top1_error")
        return dict(re.findall(r'title="(\d+)"><th scope="row"><i class="swatch (.*?)"', text))

    assert looks(grid[:5]).items() <= looks(grid).items()


def test_what_mattered_by_hand(grid: list[Path]) -> None:
    rates, seeds = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3], [0, 1, 0, 1, 0, 1]
    metric = np.array([1.0, 2, 11, 12, 21, 22])
    found = what_mattered({"seed": seeds, "rate": rates, "word": ["a", "b"] * 3}, metric)
    assert list(found)[0] == "rate"
    # Within: three groups of squares 0.25 + 0.25; total: squares of ±10.5, ±9.5, ±0.5.
    within, total = 1.5 / 3, (2 * 10.5**2 + 2 * 9.5**2 + 2 * 0.5**2) / 5
    assert found["rate"].explained == pytest.approx(1 - within / total)
    assert found["rate"].correlation == pytest.approx(0.956183)  # Spearman's, with ties
    assert found["word"].explained == found["seed"].explained == 0.0
    assert math.isnan(found["word"].correlation)
    every = what_mattered({"x": list(range(12))}, np.arange(12.0) ** 3)
    assert every["x"].explained == every["x"].correlation == pytest.approx(1)
    four = what_mattered({"x": [1, 2, 3, 4], "word": list("abcd")}, np.array([4.0, 3, 2, 1]))  # each a value of its own
    assert (four["x"].explained, four["x"].correlation) == pytest.approx((1, -1))
    assert math.isnan(four["word"].explained)
    assert what_mattered({"rate": rates[:3]}, metric[:3]) == what_mattered({"rate": rates}, np.ones(6)) == {}
    assert what_mattered({"rate": rates}, np.array([1, 2, 3, np.nan, np.nan, np.nan])) == {}


def test_what_was_changed_together_is_named_together() -> None:
    differ = {"lr": [0.1, 0.1, 0.2], "size": [3, 3, 9], "seed": [0, 1, 2], "x": [5, 6, 7], "net": ["a", "b", "b"]}
    assert changed_together(differ) == {"lr": ["size"], "seed": [], "x": [], "net": []}


def test_runs_of_all_kinds_beside_each_other(spp: Spp, grid: list[Path], tmp_path: Path) -> None:
    (grid[0] / "results.json").unlink()
    (grid[0] / "history.jsonl").unlink()
    (grid[1] / "config.yaml").write_text("a: [")
    lines = [json.dumps({**row, "val/top1_error": math.nan} if "val/loss" in row else row) for row in history(4, 5)]
    (grid[2] / "history.jsonl").write_text("\n".join(lines))
    assert spp("report", "multiruns", "output=x.html").code == 0
    assert sum("data-run" in each for each in read(tmp_path / "x.html").all("tr")) == 9


@pytest.mark.slow
def test_five_hundred_runs(spp: Spp, tmp_path: Path) -> None:
    for i in range(500):
        write_run(tmp_path / "runs" / f"{i:03}", config_with(seed=i, optimizer__lr=0.1 / (1 + i % 5)), 20.0 + i % 7)
    assert spp("report", "runs", "output=x.html").code == 0
    found = read(tmp_path / "x.html")
    assert sum("data-run" in each for each in found.all("tr")) == 500
    for title in ("val/top1_error by epoch", "parallel coordinates", "seed"):
        assert title in found.titles()
    assert (tmp_path / "x.html").stat().st_size < 2e6


# The command


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: there is no such folder; name a run folder"),
        (["empty"], "empty: there is no run in it"),
        (["multiruns", "empty"], "empty: there is no run in it"),
        (
            ["multiruns", "metric=val/top1_eror"],
            "metric=val/top1_eror: no run has that metric; did you mean val/top1_error?",
        ),
        (["multiruns", "output=empty"], "output=empty: is a folder; name a file"),
        (["multiruns", "output=file/x.html"], "output=file/x.html: file is a file; name another place"),
        ([], "run has no value: give one, like run="),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    spp: Spp, grid: list[Path], tmp_path: Path, words: list[str], line: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    answer = spp("report", *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith(f"spp report: {line}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "multiruns"]


def test_the_page_of_a_sweep(spp: Spp, tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "mine"
    lines = ["number,state,value,run,reason"]
    for i, (error, state) in enumerate([(40.0, "complete"), (60.0, "complete"), (5.0, "fail"), (90.0, "pruned")]):
        write_run(folder / "trials" / f"{i:05d}", config_with(optimizer__lr=0.1 + i), error)
        lines.append(f"{i},{state},{error},trials/{i:05d},")
    (folder / "trials.csv").write_text("\n".join(lines) + "\n")
    for direction, best in (("minimize", "40.00, 00000"), ("maximize", "60.00, 00001")):
        (folder / "sweep.json").write_text(json.dumps({"trials": 4, "direction": direction}))
        answer = spp("report", "sweeps/mine")
        assert answer.out.startswith("sweeps/mine/report.html (4 runs, ")
        text = (folder / "report.html").read_text()
        assert "<h1>Sweep mine: 4 trials</h1>" in text and f"<dd>{best}</dd>" in text
        assert "2 finished, 1 failed, 1 pruned" in text
