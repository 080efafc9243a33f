"""Image sets, latents and statistics of foreign bytes: read rightly, or refused in a line, and nothing swells."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from neon.data.arrays import read_array
from neon.data.images import ImageDataset, write_images
from neon.data.pictures import decode_image
from neon.errors import RequestError
from neon.metrics import Statistics

GREY = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n%%EndComments\nshowpage\n%%EOF\n"


@contextmanager
def modest(largest: int = 1 << 25) -> Iterator[None]:
    """Assert that no more than `largest` bytes are held at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < largest
    finally:
        tracemalloc.stop()


def encoded(picture: Image.Image, form: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ihdr(side: int, bits: int, kind: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0))


PNG = encoded(Image.fromarray(GREY))


# Pixels


def test_sixteen_bits_are_scaled_and_not_cut_off() -> None:
    values = np.array([[0, 1, 128, 129], [257, 32768, 65406, 65535]], np.uint16)
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(values))), np.stack([expected] * 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_decode_to_grey_or_rgb_as_ever(mode: str) -> None:
    picture = Image.fromarray(COLOURS).convert(mode)
    data = encoded(picture, "jpeg" if mode == "CMYK" else "png")
    found = decode_image(data)
    again = Image.open(io.BytesIO(data))
    expected = np.asarray(again)[None] if mode == "L" else np.asarray(again.convert("RGB")).transpose(2, 0, 1)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)


def test_a_grey_image_among_coloured_ones_is_one_of_them(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(GREY if i != 1 else COLOURS).save(tmp_path / f"{i}.png")
    dataset = ImageDataset(tmp_path)
    assert dataset.image_shape == (3, 6, 6)
    pixels = dataset.examples(range(3))
    assert torch.equal(pixels[0], torch.from_numpy(GREY).expand(3, 6, 6))
    assert torch.equal(pixels[1], torch.from_numpy(COLOURS).permute(2, 0, 1))


def test_orientation_tags_are_not_applied() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.fromarray(COLOURS[:4])
    assert np.array_equal(decode_image(encoded(picture, exif=turned)), decode_image(encoded(picture)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither PNG"),
        (EPS, "neither PNG"),
        (b"DDS " + bytes(200), "neither PNG"),
        (encoded(Image.fromarray(np.zeros((6, 6), np.float32)), "tiff"), "neither PNG"),
        (PNG[:60], "truncated"),
        (PNG[:8] + ihdr(20_000, 8, 2) + PNG[33:], "decompression bomb"),
        (PNG[:8] + ihdr(9000, 8, 2) + PNG[33:], "9000 x 9000 pixels"),
        (PNG[:33] + chunk(b"IDAT", zlib.compress(bytes(9))) + bytes(4) + b"\0\0\0\0rest", "broken PNG"),
        (PNG[:33] + chunk(b"IHDR", b"") + PNG[33:], "IHDR"),
        (PNG[:8] + ihdr(6, 3, 9) + PNG[33:], ""),
    ],
    ids=["empty", "eps", "dds", "float", "short", "bomb", "large", "chunk", "ihdr", "mode"],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    write_images(tmp_path, range(1), torch.zeros(1, 1, 6, 6, dtype=torch.uint8))
    (tmp_path / "b.png").write_bytes(data)
    with modest(), pytest.raises(RequestError, match=rf"b\.png cannot be read.*{message}"):
        ImageDataset(tmp_path).examples([1])


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(RequestError, match="neither PNG"):
        ImageDataset(tmp_path)
    assert not (tmp_path / "called").exists()


def test_pictures_that_are_not_read_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tif").touch()
    with pytest.raises(RequestError, match=r"found only a\.tif"):
        ImageDataset(tmp_path)
    for name in ("a.png", ".b.png", "Thumbs.db", ".DS_Store", "captions.txt", "run.json", "real.npz"):
        (tmp_path / name).write_bytes(PNG)
    assert ImageDataset(tmp_path).names == ["a.png"]
    assert "left out 1 that are not read, the first is a.tif" in capsys.readouterr().err


# Zips


def packed(path: Path, data: bytes = PNG, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", PNG)
        archive.writestr("b.png", data)
    return path


def gigabytes(count: int) -> bytes:
    """So many, as a zip states sizes and places."""
    return struct.pack("<I", count * 1_000_000_000)


def patched(data: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """`data`, with bytes written at an offset from the last place of a mark; for each (mark, offset, bytes)."""
    result = bytearray(data)
    for mark, offset, value in changes:
        at = data.rindex(mark) + offset
        result[at : at + len(value)] = value
    return bytes(result)


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: patched(d, (LOCAL, 8, b"\x09"), (CENTRAL, 10, b"\x09")), "b.png cannot be read .*method 9"),
        (lambda d: patched(d, (LOCAL, 8, b"\x63"), (CENTRAL, 10, b"\x63")), "b.png cannot be read .*method 99"),
        (lambda d: patched(d, (LOCAL, 6, b"\x01"), (CENTRAL, 8, b"\x01")), "b.png cannot be read .*encrypted"),
        (lambda d: patched(d, (LOCAL, 35, b"\xff" * 9)), "b.png cannot be read"),
        (lambda d: patched(d, (CENTRAL, 24, gigabytes(3))), "b.png cannot be read .*3000000000 bytes"),
        (lambda d: patched(d, (CENTRAL, 20, gigabytes(3))), "b.png cannot be read .*3000000000 bytes"),
        (lambda d: patched(d, (CENTRAL, 24, struct.pack("<I", 10))), "b.png cannot be read .*CRC"),
        (lambda d: patched(d, (CENTRAL, 0, bytes(4))), "set.zip: cannot be read as a zip .*magic"),
        (lambda d: patched(d, (CENTRAL, 6, b"\xff")), "set.zip: cannot be read as a zip .*version"),
        (lambda d: patched(d, (CENTRAL, 9, b"\x08"), (CENTRAL, 46, b"\xff")), "cannot be read as a zip .*decode"),
        (lambda d: patched(d, (CENTRAL, 42, gigabytes(2))), "b.png cannot be read"),
        (lambda d: patched(d, (CENTRAL, 46, b"a")), "holds two files named a.png"),
        (lambda d: patched(d, (END, 16, gigabytes(2))), "cannot be read|not a zip"),
        (lambda d: patched(d, (END, 12, gigabytes(2))), "cannot be read|not a zip"),
        (lambda d: d[:-30], "not a zip"),
    ],
)  # fmt: skip
def test_a_damaged_zip_is_refused_by_entry(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file = packed(tmp_path / "set.zip")
    file.write_bytes(change(file.read_bytes()))
    with modest(), pytest.raises(RequestError, match=message):
        ImageDataset(file).examples([1])


def test_an_entry_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "set.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", PNG)
        with archive.open("b.png", "w") as entry:
            for _ in range(9):
                entry.write(bytes(1 << 25))
    with modest(), pytest.raises(RequestError, match=r"b\.png cannot be read \(301989888 bytes"):
        ImageDataset(file).examples([1])
    claims_less = patched(file.read_bytes(), (CENTRAL, 24, struct.pack("<I", 1000)))
    file.write_bytes(claims_less)
    with modest(), pytest.raises(RequestError, match=r"b\.png cannot be read .*Bad CRC"):
        ImageDataset(file).examples([1])


def test_a_large_file_in_a_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    os.truncate(tmp_path / "a.png", 3_000_000_000)
    with modest(), pytest.raises(RequestError, match=r"a\.png cannot be read \(3000000000 bytes, of which at most"):
        ImageDataset(tmp_path)


# Arrays


def npy(header: str, data: bytes = bytes(64), version: int = 1) -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


def form(shape: str = "(8,)", descr: str = "'<f8'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f8", np.uint8, np.int64, bool, np.longdouble])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_arrays_that_numpy_writes_are_read(shape: tuple[int, ...], dtype: object, order: str) -> None:
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype=dtype, order=order)
    buffer = io.BytesIO()
    np.save(buffer, array)
    found = read_array(io.BytesIO(buffer.getvalue()), len(buffer.getvalue()))
    assert found.dtype == array.dtype and found.shape == shape and np.array_equal(found, array)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("header", [form("(8L,)"), form("(2, 4)").strip()])
def test_headers_of_old_pythons_are_read(header: str, version: int) -> None:
    data = npy(header, version=version)
    assert read_array(io.BytesIO(data), len(data)).size == 8


@pytest.mark.parametrize(
    "data",
    [
        npy(form("(4000000000,)")),
        npy(form("(1 << 40,)")),
        npy(form("(-8,)")),
        npy(form("(8.0,)")),
        npy(form("(True,)")),
        npy(form("(8,")),
        npy(form("8")),
        npy(form("(" + "1," * 100 + ")")),
        npy(form(f"(0, {1 << 62}, {1 << 62})"), b""),
        npy(form(f"({'9' * 4999},)")),
        npy(form(descr="'|O'")),
        npy(form(descr="[('a', '<f8')]")),
        npy(form(descr="'(9,9)f8'")),
        npy(form(descr="'<f99'")),
        npy(form(descr="'<f0'")),
        npy(form(descr="'<U16'")),
        npy("{'descr': '<f8'}"),
        npy("{[]: 1}"),
        npy("(" * 5000),
        npy("-" * 9000 + "1"),
        npy("__import__('os').getpid()"),
        npy("'''"),
        npy("\0"),
        npy(""),
        npy(" " * 30_000),
        npy(form(), version=4),
        npy(form(), bytes(63)),
        npy(form(), bytes(65)),
        b"\x93NUMPY\2\0\xff\xff\xff\xff",
        b"\x93NUMPY",
        b"\x80\x04K\x01.",
        b"",
    ],
)
def test_statistics_of_damaged_arrays_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "real.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", data)
        archive.writestr("sigma.npy", data)
    with modest(), pytest.raises(RequestError, match=r"real\.npz: mu\.npy cannot be read") as refusal:
        Statistics.load(file)
    assert "pickle" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: patched(d, (CENTRAL, 8, b"\x01")), "sigma.npy cannot be read .*encrypted"),
        (lambda d: patched(d, (CENTRAL, 10, b"\x0c")), "sigma.npy cannot be read .*method 12"),
        (
            lambda d: patched(d, (CENTRAL, 24, gigabytes(2))),
            "sigma.npy cannot be read .*2000000000 bytes",
        ),
        (lambda d: patched(d, (LOCAL, 60, b"\xff" * 20)), "sigma.npy cannot be read"),
        (lambda d: d[:100], "cannot be read as .npz statistics"),
        (lambda d: b"\x80\x04}q\x00.", "cannot be read as .npz statistics"),
    ],
)
def test_damaged_statistics_are_refused_by_entry(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "real.npz"
    np.savez_compressed(file, mu=np.zeros(4), sigma=np.eye(4))
    file.write_bytes(change(file.read_bytes()))
    with modest(), pytest.raises(RequestError, match=rf"real\.npz: {message}"):
        Statistics.load(file)


@pytest.mark.parametrize("count", [np.zeros(3), -1, 0, np.nan, np.inf, 2.5])
def test_a_count_that_counts_nothing_is_refused(tmp_path: Path, count: object) -> None:
    np.savez(tmp_path / "real.npz", mu=np.zeros(4), sigma=np.eye(4), count=count)
    with pytest.raises(RequestError, match=r"real\.npz: count is .*expected the number of samples"):
        Statistics.load(tmp_path / "real.npz")


def test_what_is_not_asked_for_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "real.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros(1 << 27, np.uint8))
    with modest():
        assert Statistics.load(tmp_path / "real.npz").dim == 4
