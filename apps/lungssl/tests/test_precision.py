import pytest
import torch
import torch.nn.functional as F
from lungssl.errors import ConfigError
from lungssl.training import precision
from lungssl.training.precision import autocast, cpu_bf16
from torch import nn

CPU = torch.device("cpu")
LINEAR, CONVOLUTION = nn.Linear(2, 2), nn.Sequential(nn.Conv3d(1, 1, 3))


def _has(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(precision, "_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize(
    ("names", "linear", "convolution"),
    [
        ((), False, False),
        (("avx512_f",), False, False),
        (("avx512_f", "avx512_bf16"), True, False),
        (("avx512_f", "avx512_bf16", "amx_bf16"), True, True),
    ],
)
def test_auto_is_bf16_where_it_is_fast_and_right(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], linear: bool, convolution: bool
) -> None:
    _has(monkeypatch, *names)
    for module, expected in ((LINEAR, linear), (CONVOLUTION, convolution)):
        with autocast(CPU, "auto", module):
            assert torch.is_autocast_enabled("cpu") is expected
        with autocast(CPU, "fp32", module):
            assert not torch.is_autocast_enabled("cpu")


def test_asking_for_wrong_convolutions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, "avx512_f", "avx512_bf16")
    with pytest.raises(ConfigError, match=r"wrong gradients of 3-D convolutions .* take train.precision=auto or fp32"):
        autocast(CPU, "bf16", CONVOLUTION)
    with autocast(CPU, "bf16", LINEAR):
        assert torch.is_autocast_enabled("cpu")


def test_a_cpu_is_named_by_its_fastest_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for names, expected in ((("avx512_bf16", "amx_bf16"), "AMX"), (("avx512_bf16",), "AVX-512"), ((), "")):
        _has(monkeypatch, *names)
        assert cpu_bf16() == expected


@pytest.mark.skipif(cpu_bf16() != "AMX", reason="needs AMX")
@pytest.mark.parametrize("size", [(2, 2, 2), (4, 4, 4)])
def test_amx_convolutions_are_right(size: tuple[int, int, int]) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        x, weight = torch.randn(2, 32, *size).to(dtype), (torch.randn(32, 32, 3, 3, 3) * 0.05).to(dtype)
        out = F.conv3d(x, weight.requires_grad_(), padding=1)
        gradients.append(torch.autograd.grad(out, weight, 0.1 * out.detach())[0].float())
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()
