"""The files of a folder or of a zip, read with a limit: the one place where zips are opened and their entries read."""

import contextlib
import errno
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from neon.data.listing import entries_below, is_ours, plain
from neon.errors import RequestError, reason

LARGEST_FILE = 1 << 28
"""bytes of an image or of encoded images: 256 MiB"""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""how entries of a zip may be packed: what zipfile unpacks in steps of a size that the reader chooses"""


class Archive:
    """The files of a zip by name, read without unpacking it.

    zipfile raises a dozen kinds of exceptions on damaged bytes (BadZipFile, NotImplementedError, zlib.error,
    struct.error, UnicodeDecodeError, ...): here each becomes a RequestError that names file and entry.

    Raises:
        RequestError: the file is no zip, or its directory is damaged or names two files alike.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str = "a zip") -> None:
        """Open the file, which messages say is read as `kind`."""
        self.path = Path(path)
        try:
            self._zip = zipfile.ZipFile(_Positioned(open(self.path, "rb", buffering=0)))  # noqa: SIM115 - with the zip
        except Exception as error:
            raise RequestError(
                f"{self.path}: cannot be read as {kind} ({reason(error)}); copy or pack it again"
            ) from error
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            name = plain(entry.filename)
            if name in self.entries and not entry.is_dir():
                raise RequestError(f"{self.path}: holds two files named {name}; pack it again with one")
            self.entries[name] = entry

    @contextlib.contextmanager
    def open(self, name: str, largest: int) -> Iterator[IO[bytes]]:
        """The content of an entry, as a stream; what fails inside the block counts as a fault of the entry.

        Raises:
            RequestError: it is larger than `largest` bytes by what the directory says (more is never unpacked), is
                encrypted or packed in another way than `METHODS`, or is damaged.
        """
        entry = self.entries[name]
        try:
            if entry.flag_bits & 1:
                raise ValueError("it is encrypted; unpack it, and give the folder")
            if entry.compress_type not in METHODS:
                raise ValueError(
                    f"packed by method {entry.compress_type}, expected 0 (stored) or 8 (deflated); pack it again"
                )
            _check_size(max(entry.file_size, entry.compress_size), largest)
            with self._zip.open(entry) as stream:
                yield stream
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(f"{self.path}: {name} cannot be read ({reason(error)})") from error

    def read(self, name: str, largest: int) -> bytes:
        """The content of an entry; raises what `open` does."""
        with self.open(name, largest) as stream:
            # Not read(): that unpacks all the stream holds before it cuts it to what the directory says.
            return stream.read(self.entries[name].file_size + 1)


class _Positioned(io.RawIOBase):
    """A file with a position of its own: copies of this process (readers ahead) share that of a descriptor."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}
        origin = os.fstat(self._file.fileno()).st_size if whence == os.SEEK_END else start[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._file.fileno(), [buffer], self._position)
        self._position += count
        return count


class Storage:
    """The files of a folder, or of a zip, by their names relative to it.

    Raises:
        RequestError: the path is neither; `contents` is what the message says was expected in it.
    """

    def __init__(self, path: Path, contents: str) -> None:
        self.path, self._archive = path, None
        if path.is_file() and zipfile.is_zipfile(path):
            self._archive = Archive(path)
        elif not path.is_dir():
            kind = "a file that is not a zip" if path.exists() else "nothing"
            raise RequestError(f"{path}: expected a folder or zip of {contents}, found {kind}")

    def names(self) -> Iterator[str]:
        """The names of all files and folders, in no order; those of folders end with a slash."""
        if self._archive:
            return (name for name in self._archive.entries if name and is_ours(name))
        return (name for name, _ in entries_below(self.path))

    @contextlib.contextmanager
    def open(self, name: str, largest: int = LARGEST_FILE) -> Iterator[IO[bytes]]:
        """The content of a file, as a stream; what fails inside the block counts as a fault of the file.

        Raises:
            RequestError: it cannot be read, or is larger than `largest` bytes.
        """
        if self._archive:
            with self._archive.open(name, largest) as stream:
                yield stream
            return
        try:
            with open(self.path / name, "rb") as file:
                _check_size(os.fstat(file.fileno()).st_size, largest)
                yield file
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(f"{self.path}: {name} cannot be read ({reason(error)})") from error

    def read(self, name: str, largest: int = LARGEST_FILE) -> bytes:
        """The content of a file; raises what `open` does."""
        if self._archive:
            return self._archive.read(name, largest)
        with self.open(name, largest) as file:
            return file.read()


def _check_size(size: int, largest: int) -> None:
    if size > largest:
        raise ValueError(f"{size} bytes, of which at most {largest} are read")
