"""Reading pictures: every odd file is either read right or named in a `ValueError` of one line.

Pillow reads every header. torchcodec decodes what it gives the same pixels for, in less time: opaque still pictures of
the common kinds. Pillow decodes the rest, and large JPEGs at a reduced size where that is allowed.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor
from torchcodec.decoders import decode_avif, decode_jpeg, decode_png, decode_webp

PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
    AvifImagePlugin.AvifImageFile,
    PpmImagePlugin.PpmImageFile,
)
DECODERS: dict[str, Any] = {"JPEG": decode_jpeg, "PNG": decode_png, "WEBP": decode_webp, "AVIF": decode_avif}
MAX_PIXELS = 100_000_000
MAX_ASPECT = 1000  # longer than so many times its width, a picture would be huge with its shorter side resized
_PILLOW = re.compile(r"PIL\.")  # the modules whose warnings are of no use here

# EXIF tag 274 → what turns the stored picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The same for a tensor (3, h, w).
TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda image: image.flip(2),
    3: lambda image: image.flip(1, 2),
    4: lambda image: image.flip(1),
    5: lambda image: image.transpose(1, 2),
    6: lambda image: image.transpose(1, 2).flip(2),
    7: lambda image: image.transpose(1, 2).flip(1, 2),
    8: lambda image: image.transpose(1, 2).flip(1),
}


class Header(NamedTuple):
    """What the head of a file says: width and height in px, upright; EXIF orientation, 1 to 8; format and mode."""

    width: int
    height: int
    orientation: int
    format: str
    mode: str


class Known(NamedTuple):
    """Of a file: its length in bytes, and width and height in px, upright."""

    num_bytes: int
    width: int
    height: int


def read_rgb(
    path: Path, *, max_pixels: int = MAX_PIXELS, draft: tuple[int, int] | None = None, known: Known | None = None
) -> Tensor:
    """The picture at `path`: (3, h, w) uint8, upright (EXIF).

    First frame of animations; 16 bits divided by 257; transparency over white. The kind of file is told by its
    content, not by its name. `draft` is a (width, height) in px that is enough: a JPEG may come out at 1/2, 1/4 or 1/8
    of its size, never below `draft`. `known` is what the index knows of the file. Raises
    `ValueError("<path>: <reason>")` for a file that is no picture, is damaged or cut off, has changed, or has more than
    `max_pixels` pixels (read in its header, before any decoding).
    """
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            image, header = decode(file, max_pixels=max_pixels, draft=draft)
            if known is not None and known != (length, header.width, header.height):
                raise ValueError(
                    f"has {length} bytes and {header.width}×{header.height} px, and had {known.num_bytes} and "
                    f"{known.width}×{known.height} when the index was made: run spp check, and start again"
                )
            return image
    except Exception as error:  # Pillow's plugins raise nearly everything, from OSError to struct.error
        raise ValueError(f"{path}: {reason_of(error)}") from error


def read_header(path: Path, *, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of the picture at `path`; the same errors as `read_rgb`, as far as a header can show them."""
    try:
        with open(path, "rb") as file:
            return _header(*_open(file, max_pixels))
    except Exception as error:
        raise ValueError(f"{path}: {reason_of(error)}") from error


def decode(
    file: IO[bytes], *, max_pixels: int = MAX_PIXELS, draft: tuple[int, int] | None = None
) -> tuple[Tensor, Header]:
    """The picture (3, h, w) uint8 in an open file, as `read_rgb` gives it, and its header."""
    image, orientation = _open(file, max_pixels)
    header = _header(image, orientation)
    if header.format == "PNG" and b"IEND" not in _all(file).tobytes():  # decoders are content with all pixels
        raise ValueError("is cut off before its end")
    smaller = draft is not None and _reduces(image, draft if orientation < 5 else draft[::-1])
    if not smaller and _is_plain(image, orientation):
        try:
            data = _all(file)
            if "exif" in image.info and header.format == "JPEG":
                data = _without_exif(data)  # of several blocks, torchcodec looks for the orientation in the first
            pixels: Tensor = DECODERS[header.format](torch.from_numpy(data), mode="RGB")
            if orientation in TURNS:
                pixels = TURNS[orientation](pixels).permute(1, 2, 0).contiguous().permute(2, 0, 1)
            if pixels.shape == (3, header.height, header.width):
                return pixels, header
        except RuntimeError:  # Pillow may read it yet, or says better what is wrong
            pass
    image.load()
    rgb = _to_rgb(image)
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    buffer = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return buffer.view(rgb.height, rgb.width, 3).permute(2, 0, 1), header


def _all(file: IO[bytes]) -> npt.NDArray[np.uint8]:
    data = np.empty(file.seek(0, os.SEEK_END), np.uint8)
    file.seek(0)
    if file.readinto(data.data) != len(data):  # type: ignore[attr-defined]
        raise ValueError("became shorter while it was read")
    return data


def _without_exif(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The bytes of a JPEG, in which every block of EXIF (APP1) is called one that nobody reads (APP15)."""
    for found in re.finditer(rb"\xff\xe1..Exif\0\0", data.tobytes(), re.DOTALL):
        data[found.start() + 1] = 0xEF
    return data


def _header(image: Image.Image, orientation: int) -> Header:
    width, height = image.size if orientation < 5 else image.size[::-1]
    return Header(width, height, orientation, image.format or "", image.mode)


def _reduces(image: Image.Image, enough: tuple[int, int]) -> bool:
    """Asks a JPEG to come out at a reduced size that is `enough`; whether it will."""
    if image.format != "JPEG" or min(image.width // enough[0], image.height // enough[1]) < 2:
        return False
    image.draft(None, enough)
    return True


def _is_plain(image: Image.Image, orientation: int) -> bool:
    """Whether torchcodec gives the pixels that Pillow gives: tested for each kind."""
    if image.format not in DECODERS or image.mode not in ("RGB", "L") or image.has_transparency_data:
        return False
    if image.format == "JPEG":
        return True
    return orientation == 1 and getattr(image, "n_frames", 1) == 1


def _open(file: IO[bytes], max_pixels: int) -> tuple[Image.Image, int]:
    """The picture with only its header read, and its EXIF orientation, 1 to 8."""
    # Pillow warns of flaws that change no pixel. `catch_warnings` is unsafe in threads: this filter stays.
    first = warnings.filters[0] if warnings.filters else None
    if first is None or first[0] != "ignore" or first[3] != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
    # Not `Image.open`: it has a limit of its own, for the whole process, and tries every format it knows.
    factory = _factory(file.read(64))
    file.seek(0)
    try:
        image = factory(file, "")
    except SyntaxError as error:
        raise ValueError(f"damaged header: {reason_of(error)}") from error
    width, height = image.size
    if width * height > max_pixels:
        megapixels = f"{width * height / 1e6:.1f} megapixels, the limit is {max_pixels / 1e6:g}"
        raise ValueError(f"{width}×{height} px are {megapixels}: make it smaller")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width}×{height} px are a line, not a picture: crop or remove it")
    return image, _orientation(image, file)


def _factory(head: bytes) -> Any:
    """What opens a file that begins with `head`."""
    if not head:
        raise ValueError("is empty (0 bytes)")
    if head[4:8] == b"ftyp":  # the family of AVIF, HEIC and MP4: the brands in its first box tell which
        brands = head[8 : max(12, int.from_bytes(head[:4], "big"))]
        if b"avif" not in brands and b"avis" not in brands and re.search(b"hei[cxms]|hev[cxms]|mif1", brands):
            try:
                import pillow_heif
            except ImportError:
                raise ValueError("HEIC needs the package pillow-heif; or convert it to JPEG") from None
            return pillow_heif.HeifImageFile
    for plugin in PLUGINS:
        accept = Image.OPEN[plugin.format][1]
        accepted = accept is None or accept(head)
        if isinstance(accepted, str):
            raise ValueError(f"this Pillow was built without {plugin.format}")
        if accepted:
            return Image.OPEN[plugin.format][0]
    raise ValueError(f"not a picture of a known format: begins with {head[:16]!r}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point grey has no fixed white: convert it to 8 bits")
    if image.mode == "I" or image.mode.startswith("I;"):  # Pillow clips it at 255: nearly all white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values from {grey.min()} to {grey.max()}: convert it to 8 or 16 bits")
        white = grey == image.info.get("transparency", -1)
        grey8 = (grey.astype(np.int32) + 128) // 257
        return Image.fromarray(np.where(white, 255, grey8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = Image.new("RGBA", image.size, "white")
        over.alpha_composite(image.convert("RGBA"))
        image = over
    return image.convert("RGB")


def _orientation(image: Image.Image, file: IO[bytes]) -> int:
    """The EXIF orientation; 1 where none can be read, and for TIFF, to which Pillow applies it itself."""
    exif = image.info.get("exif", b"")
    if not exif and image.format == "PNG":
        exif = _late_exif(file)
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == 274:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, entry + 8)
                return int(value) if value in UPRIGHT else 1
    except struct.error:
        pass
    return 1


def _late_exif(file: IO[bytes]) -> bytes:
    """The EXIF of a PNG that stands behind its pixels: Pillow would decode them all to find it."""
    here = file.tell()
    try:
        file.seek(8)
        while len(chunk := file.read(8)) == 8 and chunk[4:] != b"IEND":
            size = int.from_bytes(chunk[:4], "big")
            if chunk[4:] == b"eXIf":
                return file.read(size)
            file.seek(size + 4, 1)  # its bytes and its checksum
    finally:
        file.seek(here)
    return b""


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
