"""Class and probability of pictures by a file of `spp export`; needs onnxruntime, Pillow and numpy, nothing of ours.

python scripts/classify_onnx.py RUN/exports/last.onnx a.jpg b.png --full-image
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixels_of(path: str, about: dict, full_image: bool) -> np.ndarray:
    """(1, 3, H, W) uint8: the shorter side `resize` px, whole or its centre of `region` px."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    scale = about["resize"] / min(image.size)
    image = image.resize([max(about["resize"], round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    if not full_image:
        size = about["region"]
        left, top = (round((side - size) / 2) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what spp export wrote")
    parser.add_argument("pictures", nargs="+", metavar="picture")
    parser.add_argument("--full-image", action="store_true", help="the whole picture instead of its centre")
    arguments = parser.parse_args()
    try:
        net = onnxruntime.InferenceSession(arguments.file, providers=["CPUExecutionProvider"])
        about = json.loads(net.get_modelmeta().custom_metadata_map["spp_cls"])
    except Exception as error:  # onnxruntime has errors of its own
        parser.error(f"{arguments.file}: not a file of spp export ({str(error).splitlines()[0]})")
    for path in arguments.pictures:
        try:
            pixels = pixels_of(path, about, arguments.full_image)
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        (probabilities,) = net.run(["probabilities"], {"pixels": pixels})[0]
        print(f"{path}  {about['classes'][probabilities.argmax()]} {probabilities.max():.1%}")


if __name__ == "__main__":
    main()
