"""The two sets of names of Stable Diffusion's U-Nets: those of the first release and those of diffusers.

Adapters of kohya's scripts have either. Both layouts have two residual blocks at a level on the way down and three on
the way up; networks with other numbers are known by one set of names only.
"""

from collections.abc import Collection, Iterator

FRONT = "model.diffusion_model."
"""of a U-Net's names in a file of the first release"""
_RESIDUAL = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def other_names(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(name, the same in the other set) of the tensors of a U-Net among `names`; nothing if there is none."""
    known = frozenset(names)
    ours = _holds_two(known, "down_blocks.0.resnets.1.", "down_blocks.0.resnets.2.")
    if not ours and not any(f"{front}input_blocks.3.0.op.weight" in known for front in ("", FRONT)):
        return
    pairs = [pair if ours else pair[::-1] for pair in _pairs()]
    table = {here: [there for one, there in pairs if one == here] for here, _ in pairs}
    for name in names:
        front = FRONT if name.startswith(FRONT) else ""
        words = name.removeprefix(front).split(".")
        for count in range(len(words) - 1, 0, -1):
            if found := table.get(".".join(words[:count])):
                yield from ((name, ".".join([front + there, *words[count:]])) for there in found)
                break


def _holds_two(names: Collection[str], second: str, third: str) -> bool:
    return any(name.startswith(second) for name in names) and not any(name.startswith(third) for name in names)


def _pairs() -> Iterator[tuple[str, str]]:
    """A block in diffusers and in the first release."""
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    yield from (("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"))
    yield ("mid_block.attentions.0", "middle_block.1")
    for number in range(2):
        yield from _residual(f"mid_block.resnets.{number}", f"middle_block.{2 * number}")
    for level in range(4):
        for number in range(2):
            block = f"input_blocks.{3 * level + number + 1}"
            yield from _residual(f"down_blocks.{level}.resnets.{number}", f"{block}.0")
            yield (f"down_blocks.{level}.attentions.{number}", f"{block}.1")
        yield (f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op")
        for number in range(3):
            block = f"output_blocks.{3 * level + number}"
            yield from _residual(f"up_blocks.{level}.resnets.{number}", f"{block}.0")
            yield (f"up_blocks.{level}.attentions.{number}", f"{block}.1")
        for place in (1, 2):  # behind the attention, where there is one
            yield (f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{3 * level + 2}.{place}.conv")


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{one}", f"{theirs}.{other}") for one, other in _RESIDUAL)
