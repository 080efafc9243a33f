"""Attention to all groups so far, in one piece under a mask and in pieces without: the same to rounding."""

import pytest
import torch

from neon.nn.transformer import BlockCausal
from VAR.transformer import VAR
from xAR.transformer import XAR


def of(network: VAR | XAR) -> BlockCausal:
    found: list[BlockCausal] = []
    block = network.blocks[0] if isinstance(network, VAR) else next(network.blocks())
    block.register_forward_pre_hook(lambda _, __, kwargs: found.append(kwargs["mask"]), with_kwargs=True)
    with torch.no_grad():
        if isinstance(network, VAR):
            network(torch.zeros(1, dtype=torch.int64), torch.zeros(1, network.length - 1, network.code_channels))
        else:
            cells = torch.zeros(1, network.num_cells, network.cell_length, network.latent_channels)
            network(cells, torch.zeros(1, network.num_cells, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return found[0]


CASES = {
    "VAR at 256 pixels": (
        lambda: VAR(depth=1, width=8, heads=1, vocab=4, code_channels=2, classes=2), (155, 255, 424, 680),
    ),
    "small scales": (
        lambda: VAR(depth=1, width=8, heads=1, vocab=4, code_channels=2, classes=2, patch_nums=(1, 2, 4)), (1, 5, 21),
    ),
    "xAR": (lambda: XAR(width=16, heads=1, encoder_depth=1, decoder_depth=1, classes=2), (64, 128, 192, 256)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_pieces_give_what_the_mask_gives_and_its_gradients(name: str) -> None:
    build, pieces = CASES[name]
    seen = of(build())  # type: ignore[no-untyped-call]
    assert seen._pieces() == pieces
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(2, 2, seen.ends[-1], 8, generator=generator) for _ in range(4))
    found, expected = [], []
    for split, into in ((True, found), (False, expected)):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        output = seen.attend(*inputs, scale=0.7, split=split)
        (output * weights).sum().backward()
        into += [output, *(tensor.grad for tensor in inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_on_a_cpu_it_is_one_piece() -> None:
    seen = of(XAR(width=16, heads=1, encoder_depth=1, decoder_depth=1, classes=2))
    q, k, v = torch.randn(3, 1, 1, 256, 8).unbind()
    assert torch.equal(seen.attend(q, k, v), seen.attend(q, k, v, split=False))
    half = seen.first(128)
    assert (half.mask.shape[-1], half.ends) == (128, (64, 128))
