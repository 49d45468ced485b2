import torch
from lungssl_methods.decoder_layer import DecoderLayer
from torch import nn


def test_the_block_is_torchs() -> None:
    torch.manual_seed(0)
    ours = DecoderLayer(48, 3)
    theirs = nn.TransformerEncoderLayer(48, 3, 192, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(2, 17, 48)
    found, wanted = (tokens.clone().requires_grad_() for _ in range(2))
    ours(found).square().sum().backward()
    theirs(wanted).square().sum().backward()
    torch.testing.assert_close(ours(tokens), theirs(tokens))
    torch.testing.assert_close(found.grad, wanted.grad)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
