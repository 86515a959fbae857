from __future__ import annotations

import struct
import sys
import threading
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from spp_cls.data import reader
from spp_cls.data.reader import Known, read_header, read_rgb

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def rgb(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels, after checking what holds for every picture that can be read."""
    image = read_rgb(path)
    header = read_header(path)
    assert image.dtype == torch.uint8 and image.shape == (3, header.height, header.width)
    return image.permute(1, 2, 0).numpy()


def refused(path: Path, reason: str, *, by_size: bool = True) -> None:
    """The reader names the file and the reason in one line; the header alone shows it if `by_size`."""
    reads: list[Callable[[Path], object]] = [read_rgb, read_header] if by_size else [read_rgb]
    for read in reads:
        with pytest.raises(ValueError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and reason in message and "\n" not in message


def png(
    path: Path,
    size: tuple[int, int],
    bits: int,
    colour: int,
    pixels: bytes,
    *,
    before: bytes = b"",
    after: bytes = b"",
) -> Path:
    """A PNG by hand: `pixels` without filter bytes; more chunks stand `before` and `after` IDAT."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    line = len(pixels) // size[1]
    lines = b"".join(b"\0" + pixels[i * line : (i + 1) * line] for i in range(size[1])) if line else b""
    data = chunk(b"IDAT", zlib.compress(lines))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b""))
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """A TIFF header and one entry: tag 274, as a SHORT (3) or a LONG (4)."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    mark = b"MM" if order == ">" else b"II"
    return mark + struct.pack(order + "HIHHHI", 42, 8, 1, 274, kind, 1) + value + bytes(4)


@pytest.fixture
def photo() -> Image.Image:
    """48×32 px, smooth, so that a lossy format keeps it within a few grey levels."""
    y, x = np.mgrid[0:32, 0:48]
    return Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 2 - y * 2], axis=2).astype(np.uint8))


# Kinds of files


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_formats_give_the_very_pixels(tmp_path: Path, photo: Image.Image, suffix: str) -> None:
    photo.save(tmp_path / f"a.{suffix}")
    assert (rgb(tmp_path / f"a.{suffix}") == np.asarray(photo)).all()


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
def test_lossy_formats_give_nearly_the_pixels(tmp_path: Path, photo: Image.Image, suffix: str) -> None:
    photo.save(tmp_path / f"a.{suffix}", quality=95)
    assert np.abs(rgb(tmp_path / f"a.{suffix}").astype(int) - np.asarray(photo)).mean() < 4


def test_the_content_tells_the_kind_not_the_name(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png")
    path = (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert (rgb(path) == np.asarray(photo)).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (rgb(tmp_path / f"a.{suffix}") == RED).all()


# Kinds of pixels


def test_grey_one_bit_and_palette(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    grey.save(tmp_path / "l.png")
    assert rgb(tmp_path / "l.png").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    grey.point(lambda v: v > 50 and 255, "1").save(tmp_path / "1.png")
    assert rgb(tmp_path / "1.png").tolist() == [[[0] * 3, [255] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert rgb(tmp_path / "p.png").tolist() == [[list(RED), list(BLUE)]]


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    # alpha 0 → white; 255 → the colour; 51 of 255 is a fifth: 0.2 · colour + 0.8 · 255
    rgba = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [5, 0, 0, 51]]], dtype=np.uint8))
    rgba.save(tmp_path / "rgba.png")
    assert rgb(tmp_path / "rgba.png").tolist() == [[list(WHITE), list(RED), [205, 204, 204]]]
    la = Image.fromarray(np.array([[[0, 0], [9, 255], [0, 51]]], dtype=np.uint8))
    la.save(tmp_path / "la.png")
    assert rgb(tmp_path / "la.png").tolist() == [[list(WHITE), [9] * 3, [204] * 3]]
    rgba.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    assert rgb(tmp_path / "rgba.webp").tolist() == [[list(WHITE), list(RED), [205, 204, 204]]]

    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *BLUE, *GREEN])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "index.png", transparency=1)
    assert rgb(tmp_path / "index.png").tolist() == [[list(RED), list(WHITE), list(GREEN)]]
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 255]))
    assert rgb(tmp_path / "bytes.png").tolist() == [[list(RED), list(WHITE), list(GREEN)]]
    palette.save(tmp_path / "index.gif", transparency=1)
    assert rgb(tmp_path / "index.gif").tolist() == [[list(RED), list(WHITE), list(GREEN)]]

    Image.new("RGB", (1, 1), RED).save(tmp_path / "key.png", transparency=RED)
    assert rgb(tmp_path / "key.png").tolist() == [[list(WHITE)]]


def test_alpha_that_is_multiplied_in(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(np.array([[[51, 0, 0, 51]]], dtype=np.uint8)).save(path)
    tag = struct.Struct("<HHIHH")  # 338, ExtraSamples, one SHORT: 2 is alpha beside the colour, 1 alpha in it
    assert path.read_bytes().count(tag.pack(338, 3, 1, 2, 0)) == 1
    path.write_bytes(path.read_bytes().replace(tag.pack(338, 3, 1, 2, 0), tag.pack(338, 3, 1, 1, 0)))
    assert rgb(path).tolist() == [[[255, 204, 204]]]  # red at a fifth over white


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(rgb(tmp_path / "a.jpg").astype(int) - RED).max() <= 3


GREY16 = np.array([[65535, 32896, 257, 128, 129, 0]], dtype=np.uint16)
GREY8 = [255, 128, 1, 0, 1, 0]  # 128 / 257 is just below a half, 129 / 257 just above


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "big.tiff", "a.pgm"])
def test_16_bit_grey_is_divided_by_257(tmp_path: Path, name: str) -> None:
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 6 1 65535\n" + GREY16.astype(">u2").tobytes())
    elif name == "big.tiff":
        Image.frombytes("I;16B", (6, 1), GREY16.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(GREY16).save(tmp_path / name)
    assert rgb(tmp_path / name)[0].tolist() == [[value] * 3 for value in GREY8]


def test_16_bit_colour(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", (2, 1), 16, 2, np.array([65535, 32896, 0, 257, 0, 514], ">u2").tobytes())
    assert rgb(path).tolist() == [[[255, 128, 0], [1, 0, 2]]]


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    pixels = np.array([0, 257, 65535], ">u2").tobytes()
    path = png(tmp_path / "a.png", (3, 1), 16, 0, pixels, before=chunk(b"tRNS", b"\x01\x01"))
    assert rgb(path)[0, :, 0].tolist() == [0, 255, 255]


def test_grey_without_a_known_white_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "f.tiff")
    refused(tmp_path / "f.tiff", "floating-point grey has no fixed white", by_size=False)
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "i.tiff")
    refused(tmp_path / "i.tiff", "grey values from 0 to 70000", by_size=False)
    Image.fromarray(np.array([[-1, 5]], dtype=np.int32)).save(tmp_path / "n.tiff")
    refused(tmp_path / "n.tiff", "grey values from -1 to 5", by_size=False)


# Two decoders


def by_pillow_alone(monkeypatch: pytest.MonkeyPatch, path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with monkeypatch.context() as without:
        without.setattr(reader, "DECODERS", {})
        return rgb(path)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 90}),
        ("a.jpg", "RGB", {"quality": 100, "subsampling": "4:4:4"}),
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "L", {"quality": 60}),
        ("a.png", "RGB", {}),
        ("a.png", "L", {}),
        ("a.webp", "RGB", {"quality": 80}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.avif", "RGB", {"quality": 80}),
    ],
)
def test_torchcodec_and_pillow_give_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mode: str, options: dict[str, Any]
) -> None:
    chance = np.random.default_rng(0)
    coarse = Image.fromarray(chance.integers(0, 256, (9, 11, 3), np.uint8))
    coarse.resize((77, 61), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as image:
        kind = image.format or ""
    ours = reader.DECODERS[kind]
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return ours(*arguments, **options)

    monkeypatch.setitem(reader.DECODERS, kind, counted)
    both = rgb(tmp_path / name)
    assert calls == [1]  # it was torchcodec that decoded
    assert (both == by_pillow_alone(monkeypatch, tmp_path / name)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    levels = [0, 1, 2**bits - 1, 1]
    line = int("".join(f"{level:0{bits}b}" for level in levels).ljust(16, "0"), 2).to_bytes(2, "big")
    path = png(tmp_path / "a.png", (4, 1), bits, 0, line[: -(-4 * bits // 8)])
    expected = [[round(255 * level / (2**bits - 1))] * 3 for level in levels]
    assert rgb(path).tolist() == [expected]
    assert by_pillow_alone(monkeypatch, path).tolist() == [expected]


@pytest.mark.parametrize(
    "block", [b"nonsense", b"MM\0*", exif(6)[:12], exif(9), exif(0), exif(3, "<"), exif(6, ">", 4)]
)
def test_both_take_the_same_from_an_odd_exif(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image, block: bytes
) -> None:
    photo.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    assert (rgb(tmp_path / "a.jpg") == by_pillow_alone(monkeypatch, tmp_path / "a.jpg")).all()


def test_what_torchcodec_refuses_is_left_to_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("cannot")

    photo.save(tmp_path / "a.png")
    monkeypatch.setitem(reader.DECODERS, "PNG", refuses)
    assert (rgb(tmp_path / "a.png") == np.asarray(photo)).all()


def test_a_file_of_another_length_is_refused(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png")
    length = (tmp_path / "a.png").stat().st_size
    assert read_rgb(tmp_path / "a.png", known=Known(length, 48, 32)).shape == (3, 32, 48)
    for known, had in ((Known(7, 48, 32), "7 and 48×32"), (Known(length, 32, 48), f"{length} and 32×48")):
        with pytest.raises(ValueError, match=rf"a\.png: has {length} bytes and 48×32 px, and had {had} when the index"):
            read_rgb(tmp_path / "a.png", known=known)


def test_a_draft_is_compared_with_what_the_header_says(tmp_path: Path) -> None:
    Image.new("RGB", (800, 400), RED).save(tmp_path / "a.jpg")
    known = Known((tmp_path / "a.jpg").stat().st_size, 800, 400)
    assert read_rgb(tmp_path / "a.jpg", draft=(200, 100), known=known).shape == (3, 100, 200)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_of_a_jpeg_whose_exif_is_not_its_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, order: str, kind: int
) -> None:
    blocks = STORED[orientation].repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(blocks).save(tmp_path / "a.jpg", quality=95, subsampling="4:4:4")
    data = (tmp_path / "a.jpg").read_bytes()
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
    both = [xmp, b"Exif\0\0" + exif(orientation, order, kind)]
    apps = b"".join(b"\xff\xe1" + (len(each) + 2).to_bytes(2, "big") + each for each in both)
    (tmp_path / "a.jpg").write_bytes(data[:2] + apps + data[2:])
    middles = rgb(tmp_path / "a.jpg")[8::16, 8::16].astype(int)
    assert middles.shape == (2, 3, 3) and np.abs(middles - UPRIGHT).max() < 16
    assert (rgb(tmp_path / "a.jpg") == by_pillow_alone(monkeypatch, tmp_path / "a.jpg")).all()


# EXIF orientation

# How a picture of 3×2 px is stored for each orientation, by the sides that the EXIF standard names.
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, BLACK, RED]], dtype=np.uint8)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_orientation_is_applied_to_the_pixel(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    tags = image.getexif()
    tags[274] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    image.save(tmp_path / f"a.{suffix}", exif=tags, **options)
    assert (rgb(tmp_path / f"a.{suffix}") == UPRIGHT).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_orientation_of_lossy_formats(tmp_path: Path, orientation: int, suffix: str) -> None:
    blocks = STORED[orientation].repeat(16, axis=0).repeat(16, axis=1)
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(blocks).save(tmp_path / f"a.{suffix}", exif=tags, quality=95, subsampling="4:4:4")
    middles = rgb(tmp_path / f"a.{suffix}")[8::16, 8::16].astype(int)
    assert middles.shape == (2, 3, 3) and np.abs(middles - UPRIGHT).max() < 16


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("place", ["before", "after"])
def test_exif_of_a_png_before_and_behind_the_pixels(tmp_path: Path, order: str, kind: int, place: str) -> None:
    pixels = np.ascontiguousarray(STORED[6]).tobytes()
    block = chunk(b"tEXt", b"a\0b") + chunk(b"eXIf", exif(6, order, kind))
    path = png(tmp_path / "a.png", (2, 3), 8, 2, pixels, **{place: block})
    assert (rgb(path) == UPRIGHT).all()


@pytest.mark.parametrize(
    "block", [b"nonsense", b"MM\0*", exif(6)[:12], exif(6)[:14], exif(9), exif(0), b"MM\0*\xff\xff\xff\xff"]
)
def test_exif_that_says_nothing_leaves_the_picture_as_it_is(tmp_path: Path, block: bytes) -> None:
    path = png(tmp_path / "a.png", (3, 2), 8, 2, UPRIGHT.tobytes(), before=chunk(b"eXIf", block))
    assert (rgb(path) == UPRIGHT).all()


def test_warnings_do_not_leak_and_strange_filters_do_not_matter(tmp_path: Path, photo: Image.Image) -> None:
    # EXIF that promises 1000 entries: Pillow warns of it while it looks for the resolution.
    block = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1000) + bytes(20)
    photo.save(tmp_path / "a.jpg", exif=block)
    data = (tmp_path / "a.jpg").read_bytes()
    start = data.index(b"\xff\xe0")
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    (tmp_path / "a.jpg").write_bytes(data[:start] + data[start + 2 + length :])  # without JFIF it does look
    with pytest.warns(UserWarning), Image.open(tmp_path / "a.jpg"):
        pass
    rgb(tmp_path / "a.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # now in front of the reader's own filter
        rgb(tmp_path / "a.jpg")
        before = len(warnings.filters)
        rgb(tmp_path / "a.jpg")
        assert len(warnings.filters) == before


# Draft


def test_draft_reads_a_jpeg_small_but_never_below_what_is_enough(tmp_path: Path) -> None:
    Image.new("RGB", (800, 400), RED).save(tmp_path / "a.jpg")
    assert read_rgb(tmp_path / "a.jpg", draft=(200, 100)).shape == (3, 100, 200)
    assert read_rgb(tmp_path / "a.jpg", draft=(201, 100)).shape == (3, 200, 400)
    assert read_rgb(tmp_path / "a.jpg", draft=(1, 1)).shape == (3, 50, 100)
    assert read_rgb(tmp_path / "a.jpg", draft=(2000, 1000)).shape == (3, 400, 800)
    Image.new("RGB", (800, 400)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png", draft=(100, 50)).shape == (3, 400, 800)


def test_draft_counts_in_the_upright_picture(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    Image.new("RGB", (800, 400), RED).save(tmp_path / "a.jpg", exif=tags)  # 400×800 upright
    assert read_rgb(tmp_path / "a.jpg", draft=(100, 200)).shape == (3, 200, 100)
    assert read_rgb(tmp_path / "a.jpg", draft=(200, 100)).shape == (3, 400, 200)


# Files that cannot be read


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tiff", "avif", "ppm"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "", by_size=False)


def test_a_png_without_its_end_is_refused_though_all_pixels_are_there(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", (3, 1), 8, 2, bytes(9))
    assert rgb(path).max() == 0
    path.write_bytes(path.read_bytes()[:-12])
    refused(path, "is cut off before its end", by_size=False)


def test_a_file_cut_inside_its_header_is_refused(tmp_path: Path, photo: Image.Image) -> None:
    for suffix in ("jpg", "png", "gif", "webp", "bmp", "tiff", "avif", "ppm"):
        path = tmp_path / f"a.{suffix}"
        photo.save(path)
        path.write_bytes(path.read_bytes()[: 17 if suffix != "ppm" else 5])
        refused(path, "")


def test_zero_bytes_text_and_films_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").write_bytes(b"")
    refused(tmp_path / "zero.jpg", "is empty (0 bytes)")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    refused(tmp_path / "page.jpg", "not a picture of a known format: begins with b'<!DOCTYPE html><'")
    (tmp_path / "film.jpg").write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0isommp42")
    refused(tmp_path / "film.jpg", "not a picture of a known format")
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n")
    refused(tmp_path / "eps.jpg", "not a picture of a known format")  # Pillow alone would start Ghostscript
    (tmp_path / "bm.jpg").write_text("BMW has a nice factory, and this is a text about it.")
    refused(tmp_path / "bm.jpg", "")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.jpg", "No such file or directory")
    (tmp_path / "folder.jpg").mkdir()
    refused(tmp_path / "folder.jpg", "Is a directory")


def test_a_huge_header_is_refused_before_any_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setitem(reader.DECODERS, "PNG", lambda *_, **__: pytest.fail("decoded"))
    bomb = png(tmp_path / "bomb.png", (30000, 30000), 8, 2, b"")
    refused(bomb, "30000×30000 px are 900.0 megapixels, the limit is 100: make it smaller")
    refused(png(tmp_path / "over.png", (10000, 10001), 8, 2, b""), "10000×10001 px are 100.0 megapixels")
    # up to the limit, and beyond the one of Pillow, which warns above 89 megapixels and refuses above 178
    assert read_header(png(tmp_path / "full.png", (10000, 10000), 8, 2, b""))[:2] == (10000, 10000)
    assert read_header(bomb, max_pixels=900_000_000)[:2] == (30000, 30000)


def test_a_line_is_refused(tmp_path: Path) -> None:
    refused(
        png(tmp_path / "line.png", (20000, 2), 8, 2, b""), "20000×2 px are a line, not a picture: crop or remove it"
    )
    assert read_header(png(tmp_path / "long.png", (2, 2000), 8, 2, b""))[:2] == (2, 2000)


def test_the_limit_is_an_argument(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png", max_pixels=48 * 32).shape == (3, 32, 48)
    with pytest.raises(ValueError, match="48×32 px are 0.0 megapixels"):
        read_rgb(tmp_path / "a.png", max_pixels=48 * 32 - 1)


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40)


def test_heic_asks_for_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(HEIC)
    refused(tmp_path / "a.heic", "HEIC needs the package pillow-heif; or convert it to JPEG")
    (tmp_path / "a.jpg").write_bytes(HEIC.replace(b"ftypheic", b"ftypmif1"))
    refused(tmp_path / "a.jpg", "HEIC needs the package pillow-heif")


def test_heic_is_read_where_the_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(file: Any, name: str) -> Image.Image:
        assert file.read() == HEIC
        return Image.new("RGB", (2, 1), RED)

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(HeifImageFile=opened))
    (tmp_path / "a.heic").write_bytes(HEIC)
    assert rgb(tmp_path / "a.heic").tolist() == [[list(RED)] * 2]


@pytest.fixture
def many(tmp_path: Path) -> Iterator[list[Path]]:
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    yield sorted(tmp_path.glob("*.png"))


def test_threads_read_at_once(many: list[Path]) -> None:
    found: dict[int, list[int]] = {}

    def read(thread: int) -> None:
        found[thread] = [int(read_rgb(path)[0, 0, 0]) for path in many]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: list(range(20)) for number in range(4)}
