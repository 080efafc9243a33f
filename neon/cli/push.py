"""`neon push`: a model, its card and its page to the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from neon.errors import RequestError, shown


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a model's folder to the Hugging Face Hub: weights, configuration, model card, page and pictures.

    The folder is one that `neon improve`, `neon tune` or `neon merge` wrote. State and records of the run, logs, code
    and what names folders of this machine stay here, and each is named. Log in with `hf auth login`, or set HF_TOKEN.

    Example: neon push runs/improve hf:someone/improved --dry-run
    """

    folder: tyro.conf.Positional[Path]
    """the folder to upload"""
    repository: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="hf:ORG/REPO")]]
    """where to; made if it is not there"""
    private: bool = False
    """a repository that is made can be seen by its owner only"""
    dry_run: bool = False
    """list the files and their sizes; upload nothing"""

    def __call__(self) -> None:
        from neon.runtime.hub import parsed
        from neon.runtime.hub_upload import survey, upload

        name = parsed(self.repository)
        if name.inside or name.revision:
            raise RequestError(f"{self.repository}: a folder goes to a whole repository; expected hf:ORG/REPO")
        found = survey(self.folder)
        for file in found.files:
            print(shown(f"{(self.folder / file).stat().st_size:>14,} bytes  {file}"))
        for file, reason in found.left_out.items():
            print(shown(f"{'left out':>20}  {file} ({reason})"))
        if self.dry_run:
            total = sum((self.folder / file).stat().st_size for file in found.files)
            print(f"{len(found.files)} files of {total:,} bytes would go to {self.repository}; nothing was uploaded")
            return
        print(f"uploaded to {upload(self.folder, found.files, name.repository, private=self.private)}")
