"""The long description of the package: README.md with links that lead somewhere outside the repository, too.

Everything else is in pyproject.toml. NEON_REPOSITORY is the address of the repository where a release is built, such as
https://github.com/OWNER/neon; without it what is relative becomes plain text, and pictures are left out.
"""

import os
import re
from pathlib import Path

from setuptools import setup


def with_absolute_links(text: str, repository: str) -> str:
    """Markdown `text` (HTML tags in it, too) whose relative links and pictures are those of `repository`, or gone."""
    relative = r"(?![a-z]+:|#)[^)\"\s]+"

    def address(path: str, kind: str) -> str:
        return f"{repository.rstrip('/')}/{kind}/HEAD/{path}"

    def picture(found: re.Match[str]) -> str:
        return f"{found[1]}{address(found[2], 'raw')}{found[3]}" if repository else ""

    def link(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{found[3]}{address(found[4], 'blob')}{found[5]}" if repository else found[2]

    of_tag = rf"(<(?:img|source)\b[^>]*?\bsrc(?:set)?=\")({relative})(\"[^>]*>)"
    for pattern in (rf"(!\[[^]]*\]\()({relative})(\))", of_tag):
        text = re.sub(pattern, picture, text)
    text = re.sub(rf"(\[)([^][]*)(\]\()({relative})(\))", link, text)
    if repository:
        return re.sub(rf"(<a\b[^>]*?\bhref=\")({relative})(\")", lambda m: f"{m[1]}{address(m[2], 'blob')}{m[3]}", text)
    return re.sub(rf"<a\b[^>]*?\bhref=\"{relative}\"[^>]*>(.*?)</a>", r"\1", text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(
        long_description=with_absolute_links(readme, os.environ.get("NEON_REPOSITORY", "")),
        long_description_content_type="text/markdown",
    )
