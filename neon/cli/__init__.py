"""The `neon` command and what the programs of all architectures share."""

from neon.cli.app import main

__all__ = ["main"]
