"""The package diffusers, imported where a pipeline is really built: it takes seconds, and need not be installed."""

import importlib
from typing import Any

from neon.errors import RequestError

INSTALL = "install it with `pip install 'neon-extrapolation[diffusers]'` (Python 3.11 or newer)"


def library(name: str = "diffusers") -> Any:
    """The module `name` of diffusers, or of transformers; a RequestError if it is not installed.

    `name` is written in code, never read from a file.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RequestError(f"pipelines of diffusers need the package {package} ({error}); {INSTALL}") from error
