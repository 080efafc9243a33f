"""Valid files made hostile: bytes changed, or the structure that they spell, with checksums and lengths that hold.

A change of bytes mostly fails at the first checksum. `mutated` therefore looks at what a file is (zip, PNG, `.npy`,
safetensors, pickle, JSON) and changes one of its parts, so that the next reader inside is the one that meets it.
"""

import io
import json
import pickletools
import struct
import zipfile
import zlib
from random import Random
from typing import Any

DEEP = 3000
"""levels of nesting, beyond what Python's recursion allows"""
HUGE = (2**31, 2**40, 2**63, 2**64, 10**30)
TEXTS = ("", "\x1b[2J", "\ud800", "../../etc/passwd", "/etc/passwd", "x" * 3000, "cuda:0", "nul\x00", "名")
NPY_HEADERS = (
    "{'descr': '<f8', 'fortran_order': False, 'shape': (4000000000,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776, 1099511627776), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 1099511627776), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<U999999999', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (3",
    "{'descr': '<f8', 'fortran_order': False, 'shape': 1e999, }",
    "(" * 200,
    "'''",
    "\x00",
    "__import__('os').system('true')",
)
PICKLES = (
    b"cos\nsystem\n(S'true'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03tR.",
    b"cbuiltins\nbytearray\n(\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40tR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tS'b'\ntR.",
    b"]q\x00" + b"h\x00a" * 50 + b".",
    b"(" * 5000 + b"t" * 5000 + b".",
    b"]" + b"]a" * 3000 + b".",
    b"".join([b"]q\x00", *(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(60)), b"."]),
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x8c\xff.",
    b"r\xff\xff\xff\x7f.",
    b"I" + b"9" * 6000 + b"\n.",
    b"\x8b\xff\xff\xff\x7f.",
    b"Vabc\\ud800\n.",
    b".",
    b"",
)
HTTP_HEADERS = (
    b"Content-Length: -1",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 1e9",
    b"Content-Encoding: gzip",
    b"Content-Type: text/html",
    b"Content-Range: bytes 5-1/x",
    b"Transfer-Encoding: chunked",
    b"Location: http://[bad",
    b"Location: file:///etc/passwd",
    b"ETag: \x1b[31m\xff",
    b"X: " + b"y" * 70_000,
    b"no colon",
)
OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]


def mutated(data: bytes, random: Random) -> bytes:
    """`data` changed in one place or a few."""
    if random.random() < 0.3:
        return _bytes(data, random)
    if data[:4] == b"PK\x03\x04":
        return _zip(data, random)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data, random)
    if data[:6] == b"\x93NUMPY":
        return _npy(data, random)
    if data[8:9] == b"{" and len(data) > 8 + int.from_bytes(data[:8], "little"):
        return _safetensors(data, random)
    if data[:1] == b"\x80":
        return _pickle(data, random)
    if data[:5] == b"HTTP/":
        return _http(data, random)
    if data[:1] in (b"{", b"["):
        return _json_lines(data, random)
    return _bytes(data, random)


def _bytes(data: bytes, random: Random) -> bytes:
    """A few bytes flipped, set, cut, repeated, inserted or moved; or the rest of the file lost."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed) + 1)
        if random.random() < 0.5:  # the beginning, where most formats say what they are
            at = min(at, random.randrange(64))
        length = random.choice((1, 2, 4, 8, 100))
        kind = random.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at : at + length] = random.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * length
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            changed[at:at] = random.randbytes(length)
        elif kind == 5:
            changed[at : at + length] = random.randbytes(length)
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _zip(data: bytes, random: Random) -> bytes:
    """A member changed, compressed, repeated, renamed or swollen, or a field of the directory that stands for it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError):
        return _bytes(data, random)
    kind = random.choice(("member",) * 14 + ("directory", "names", "lost", "twice", "swollen", "compressed"))
    chosen = random.randrange(len(members))
    name, content = members[chosen]
    method = zipfile.ZIP_STORED
    if kind == "member":
        members[chosen] = (name, mutated(content, random))
    elif kind == "names":
        members[chosen] = (random.choice([text for text in TEXTS if "\ud800" not in text]) or "x", content)
    elif kind == "lost":
        del members[chosen]
    elif kind == "twice":
        members.append((name, mutated(content, random)))
    elif kind == "swollen":
        members[chosen], method = (name, bytes(300_000_000)), zipfile.ZIP_DEFLATED
    elif kind == "compressed":
        method = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for each, stored in members:
            archive.writestr(zipfile.ZipInfo(each), stored, compress_type=method)
    packed = bytearray(buffer.getvalue())
    if kind == "directory":
        entry = packed.find(b"PK\x01\x02")
        field, size = random.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
        value = random.choice((0, 1, 9, 98, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)) & (256**size - 1)
        packed[entry + field : entry + field + size] = value.to_bytes(size, "little")
    return bytes(packed)


def _png(data: bytes, random: Random) -> bytes:
    """A chunk changed, with the checksum that belongs to it."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    chosen = random.randrange(len(chunks))
    kind, content = chunks[chosen]
    if kind == b"IHDR" and random.random() < 0.7:
        width, height = (random.choice((0, 1, 8, 9, 30_000, 2**31 - 1)) for _ in range(2))
        depth, colour = random.choice((1, 2, 4, 8, 16, 3)), random.choice((0, 2, 3, 4, 6, 7))
        content = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, random.randrange(2))
    elif random.random() < 0.3:
        kind = random.choice((b"PLTE", b"tRNS", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fdAT", b"ABCD"))
    else:
        content = _bytes(content, random)
    chunks[chosen] = (kind, content)
    if random.random() < 0.2:
        text = b"k\x00\x00" + zlib.compress(bytes(50_000_000), 1)  # a text of 50 MB in a small file
        chunks.insert(1, (b"zTXt", text))
    out = [data[:8]]
    for kind, content in chunks:
        out += [len(content).to_bytes(4, "big"), kind, content, zlib.crc32(kind + content).to_bytes(4, "big")]
    return b"".join(out)


def _npy(data: bytes, random: Random) -> bytes:
    """Another header before the same values, with its own length; or a header that is changed a little."""
    version, head = data[6:8], 10 if data[6] == 1 else 12
    length = int.from_bytes(data[8:head], "little")
    header = random.choice(NPY_HEADERS).encode("latin-1") if random.random() < 0.7 else None
    header = header or _bytes(data[head : head + length], random)
    header = header.ljust(length - 1)[: length - 1] + b"\n"
    return data[:6] + version + data[8:head] + header + data[head + length :]


def _safetensors(data: bytes, random: Random) -> bytes:
    """A header that says another thing of the same bytes."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return _bytes(data, random)
    metadata = header.get("__metadata__")
    if metadata and random.random() < 0.5:
        name = random.choice(sorted(metadata))
        try:
            metadata[name] = _json(json.loads(metadata[name]), random)
        except ValueError:
            metadata[name] = random.choice(TEXTS)
        text = json.dumps(header)
    else:
        text = _json(header, random)
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]


def _pickle(data: bytes, random: Random) -> bytes:
    """An operation lost, repeated, replaced or with another argument; or another program altogether."""
    if random.random() < 0.25:
        program = random.choice(PICKLES)
        return (data[:2] if random.random() < 0.5 else b"") + program
    try:
        starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:  # whatever: it was changed before
        return _bytes(data, random)
    chosen = random.randrange(len(starts))
    start = starts[chosen]
    end = starts[chosen + 1] if chosen + 1 < len(starts) else len(data)
    other = random.randrange(len(starts) - 1)
    operation = data[starts[other] : starts[other + 1]]
    kind = random.randrange(6)
    if kind == 0:
        return data[:start] + data[end:]
    if kind == 1:
        return data[:end] + data[start:end] * random.choice((1, 2, 100)) + data[end:]
    if kind == 2:
        return data[:start] + operation + data[end:]
    if kind == 3:
        return data[:start] + random.choice(OPCODES) + data[start + 1 :]
    if kind == 4:
        return data[:start] + random.choice(PICKLES)[:-1] + data[start:]
    argument = bytearray(data[start + 1 : end])
    if argument:
        argument[random.randrange(len(argument))] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
    return data[: start + 1] + bytes(argument) + data[end:]


def _http(data: bytes, random: Random) -> bytes:
    """Another status, a header lost or added, or other content."""
    head, _, body = data.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    kind = random.randrange(5)
    if kind == 0:
        status = b"HTTP/1.1 " + random.choice(
            (b"204 X", b"206 X", b"301 X", b"416 X", b"500 X", b"999 X", b"-1 X", b"X")
        )
    elif kind == 1 and headers:
        del headers[random.randrange(len(headers))]
    elif kind == 2:
        body = random.choice((b"", b"<html>log in</html>", mutated(body, random)))
    else:
        headers.insert(random.randrange(len(headers) + 1), random.choice(HTTP_HEADERS))
    return b"\r\n".join([status, *headers]) + b"\r\n\r\n" + body


def _json_lines(data: bytes, random: Random) -> bytes:
    """JSON, or one line of several, with a value replaced."""
    try:
        return _json(json.loads(data), random).encode("utf-8", "surrogatepass")
    except ValueError:
        lines = data.splitlines()
    chosen = random.randrange(len(lines))
    try:
        lines[chosen] = _json(json.loads(lines[chosen]), random).encode("utf-8", "surrogatepass")
    except ValueError:
        return _bytes(data, random)
    return b"\n".join(lines) + b"\n"


def _json(value: Any, random: Random) -> str:
    """`value` as JSON, with one part of it lost, repeated or replaced by something that does not belong there."""
    places: list[tuple[Any, Any]] = []

    def collect(part: Any) -> None:
        entries = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, entry in entries:
            places.append((part, key))
            collect(entry)

    whole = [value]
    collect(whole)
    part, key = random.choice(places) if random.random() < 0.9 else places[0]
    kind = random.randrange(4)
    if kind == 0 and part is not whole:
        del part[key]
    elif kind == 1 and isinstance(part, list):
        part.insert(key, part[key])
    elif kind == 1 and isinstance(part, dict):
        part[random.choice(TEXTS)] = part[key]
    else:
        part[key] = _stranger(random)
    text = json.dumps(whole[0])
    if random.random() < 0.05:
        text = text.replace(json.dumps("@deep"), "[" * DEEP + "]" * DEEP)
    return text


def _stranger(random: Random) -> Any:
    simple: tuple[Any, ...] = (
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("nan"),
        [],
        {},
        [None],
        {"a": 1},
    )
    nested: Any = "@"
    for _ in range(500):
        nested = [nested]
    return random.choice((*simple, *HUGE, *TEXTS, nested, "@deep", list(range(2000))))
