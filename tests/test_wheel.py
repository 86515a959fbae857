"""The wheel by itself: unpacked away from the checkout it trains, in an empty folder, with things of the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

NET = """
from torch import nn
from spp_cls.models import SpatialPyramidPool2d

class Net(nn.Module):
    def __init__(self, num_classes, channels):
        super().__init__()
        pyramid = SpatialPyramidPool2d([2, 1])
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 7, 4), pyramid, nn.Linear(channels * 5, num_classes))

    def forward(self, images):
        return self.layers(images)
"""
DATA = """
from pathlib import Path
from spp_cls.data import Listing

def by_prefix(root, test_every):
    paths = sorted(path.name for path in Path(root).glob("*.jpg"))
    labels = [("cat", "dog").index(path.split("_")[0]) for path in paths]
    splits = [{0: "test", 1: "val"}.get(i % test_every, "train") for i in range(len(paths))]
    return Listing(("cat", "dog"), paths, labels, splits)
"""
CONFIGS = {
    "model/mine.yaml": "_target_: mynet.Net\nchannels: 4\n",
    "data/mine.yaml": """
defaults: [base, _self_]
root: pictures
layout: {_target_: mydata.by_prefix, _partial_: true, test_every: 4}
""",
    "experiment/mine.yaml": """# @package _global_
data: {region: 32, resize: 36, batch_size: 4, num_workers: 0}
trainer: {max_epochs: 2, accelerator: cpu}
""",
}


@pytest.mark.slow
def test_wheel_trains_outside_the_checkout_with_a_config_a_net_and_a_data_set_of_ones_own(tmp_path: Path) -> None:
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(built, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "spp_cls/conf/train.yaml" in names
    assert {name.split("/")[0] for name in names} == {"spp_cls", "spp_cls-0.1.0.dist-info"}

    own = tmp_path / "own"
    for name, text in CONFIGS.items():
        (own / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (own / "conf" / name).write_text(text)
    (own / "mynet.py").write_text(NET)
    (own / "mydata.py").write_text(DATA)
    (own / "pictures").mkdir()
    from PIL import Image

    for i in range(24):
        kind = "cat" if i % 2 else "dog"
        Image.new("RGB", (40 + i, 50), (10 * i, 200 * (i % 2), 90)).save(own / "pictures" / f"{kind}_{i:02}.jpg")

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "SPP_CACHE": str(tmp_path / "cache")}

    def spp(*words: str) -> str:
        command = [sys.executable, "-m", "spp_cls", *words]
        done = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import spp_cls; print(spp_cls.__file__)"]
    imported = subprocess.run(where, cwd=own, env=environment, capture_output=True, text=True, check=True).stdout
    assert imported.startswith(str(tmp_path / "site"))

    assert "test error" in spp("train", "model=mine", "data=mine", "experiment=mine", "name=mine")
    (run,) = (own / "runs" / "mine").iterdir()
    assert "top-1" in spp("evaluate", f"run={run}", "views=full_image", "trust=true")
    assert "pictures/cat_01.jpg" in spp("predict", f"run={run}", "pictures/cat_01.jpg", "trust=true")
