"""`neon download`: the published files, fetched to where the programs look for them."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from neon.errors import NoConnectionError, RequestError, WorkError
from neon.runtime.download import download
from neon.runtime.files import check_writable
from neon.runtime.hub import download_from_hub
from neon.runtime.published_files import Architecture, PublishedFile, published_files
from neon.runtime.signals import Stopped


@dataclass(frozen=True, kw_only=True)
class Download:
    """Fetch the published files that Neon's programs open, to where they look for them.

    That is below the working directory, and in the caches of torch and neon. What is there and whole is skipped. An
    interrupted transfer goes on, but from Hugging Face a file whose download was killed starts again. HF_ENDPOINT
    names a mirror of Hugging Face; NEON_MIRROR names a server that holds all other files by their names
    (NEON_MIRROR/cifar10-32x32.npz), those without a known address too. Exit code: 0 everything asked for is there, 1
    something is not, 2 the request was wrong.

    Example: neon download --only edm
    """

    only: Architecture | None = None
    """fetch the files of one architecture"""
    base: bool = False
    """fetch the base models too"""
    dry_run: bool = False
    """show what would be fetched, from where and to where; touch nothing"""
    list: bool = False
    """print the table of all files, tab-separated: architectures, kind, MB, source, places"""

    def __call__(self) -> int:
        """Fetch, or show; the exit code."""
        if self.list:
            for file in self._files():
                size = "-" if file.megabytes is None else str(file.megabytes)
                print("\t".join([",".join(file.architectures), file.kind, size, file.source, *file.places]))
            return 0
        present, fetched, to_come, failed, unreachable = 0, 0, 0, [], set[str]()
        for file in self._files():
            found, damage = look(file)
            if found is not None:
                present += 1
                print(f"{'present':<8} {found.stat().st_size // 1_000_000:>6} MB  {found}", flush=True)
                continue
            state = "missing" if self.dry_run else "fetching"
            print(f"{state:<8} {file.megabytes or '-':>6} MB  {file.places[0]}  {file.source}{damage}", flush=True)
            to_come += file.megabytes or 0
            if self.dry_run:
                continue
            try:
                fetch(file, unreachable)
                fetched += 1
            except (RequestError, WorkError, OSError) as error:
                failed.append(f"{file.places[0]}: {str(error).removeprefix(f'{file.places[0]}: ')}")
                print(f"failed   {failed[-1]}", file=sys.stderr)
            except Stopped as stop:
                stop.kept = stop.kept or file.name
                raise
        if self.dry_run:
            free = _free_megabytes(Path())
            print(f"{to_come} MB to come (as float32; the files may differ), {free} MB free here; nothing was touched")
            return 0
        print(f"\npresent: {present}, fetched: {fetched}, failed: {len(failed)}", *failed, sep="\n  ")
        print("The files are their publishers' and under their licences, which are not recorded here: see each source.")
        return 1 if failed else 0

    def _files(self) -> Iterator[PublishedFile]:
        for file in published_files():
            if self.only in (None, *file.architectures) and (self.base or self.list or file.kind != "base"):
                yield file


def look(file: PublishedFile) -> tuple[Path | None, str]:
    """(where `file` lies whole, what is wrong with others in its places)."""
    damage = ""
    for place in map(Path, file.places):
        if place.is_file():
            try:
                flaw = file.flaw(place)
            except OSError as error:
                flaw = f"cannot be read ({error.strerror})"
            if flaw is None:
                return place, ""
            damage += f" ({place}: {flaw})"
    return None, damage


def fetch(file: PublishedFile, unreachable: set[str]) -> None:
    """Fetch `file` to the first of its places; a server that cannot be reached is added to `unreachable`.

    Raises:
        RequestError, WorkError: it is not there afterwards.
    """
    path = Path(file.places[0])
    kind, _, rest = file.source.partition(":")
    if kind == "by":
        raise WorkError(f"published by {rest}, but no address of it is known; save it as {path}, or set NEON_MIRROR")
    server = f"Hugging Face {os.environ.get('HF_ENDPOINT', '')}".strip() if kind == "hf" else urljoin(file.source, "/")
    if server in unreachable:
        raise NoConnectionError(f"no connection to {server}, as before")
    check_writable(path, overwrite=True)
    part = path.with_name(f"{path.name}.part")
    free = _free_megabytes(path.parent) + (part.stat().st_size // 1_000_000 if part.is_file() else 0)
    if file.megabytes is not None and free < file.megabytes:
        raise WorkError(
            f"the disk is full: about {file.megabytes} MB to come, {free} MB free in {path.parent}; free some space "
            "and run again"
        )
    try:
        if kind == "hf":
            download_from_hub(rest, file.name, path, file.flaw)
        else:
            download(file.source, path, file.flaw)
    except NoConnectionError:
        unreachable.add(server)
        raise


def _free_megabytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free // 1_000_000
