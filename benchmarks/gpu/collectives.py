"""Every way in which processes exchange tensors and objects, in this one; started by torchrun, says what it used."""

import sys

import torch
import torch.distributed as dist

from neon.runtime.distributed import processes


def main(device: str) -> None:
    """Use each collective once and look at what comes back."""
    with processes(device) as group:
        ones = torch.ones(1000, device=group.device)
        dist.all_reduce(ones)
        gathered = [torch.empty_like(ones) for _ in range(group.world_size)]
        dist.all_gather(gathered, ones)
        assert all(bool((part == group.world_size).all()) for part in gathered)
        box = [{"rank": group.rank}]
        dist.broadcast_object_list(box, src=0, device=group.device if device == "cuda" else None)
        assert box == [{"rank": 0}]
        failures: list[object] = [None] * group.world_size
        dist.all_gather_object(failures, None)
        group.raise_first(None)
        assert group.from_main("here") == "here"
        group.barrier()
        print(f"{dist.get_backend()}, {group.world_size} process(es) on {group.device}")


if __name__ == "__main__":
    main(sys.argv[1])
