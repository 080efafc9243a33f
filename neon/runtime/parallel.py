"""What the ways are called in which several processes train one network (`neon.selftrain.engine`)."""

from typing import Literal

Parallel = Literal["ordered", "ddp", "fsdp"]

MOST_WORKERS = 256
"""that read ahead of one process: each is a process, too"""
