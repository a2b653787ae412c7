import resource
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rayseg.models.cpu import BatchNorm, Conv1x1, Conv3x3, reused_memory

PAIRS = [
    (Conv3x3(20, 6), nn.Conv2d(20, 6, 3, padding=1)),
    (Conv3x3(3, 6), nn.Conv2d(3, 6, 3, padding=1)),
    (Conv1x1(20, 6), nn.Conv2d(20, 6, 1)),
    (BatchNorm(20), nn.BatchNorm2d(20)),
]


def passed(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output of the layer, gradients of its input and parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_layer_and_its_gradients_equal_those_of_torch(ours, torchs, batch, layout):
    generator = torch.Generator().manual_seed(1)
    bands = 20 if isinstance(ours, nn.BatchNorm2d) else ours.in_channels
    x = torch.randn(batch, bands, 9, 7, generator=generator, dtype=torch.float64) * 3 + 1
    for parameter in torchs.parameters():
        nn.init.normal_(parameter, generator=generator)
    ours.load_state_dict(torchs.state_dict())
    ours.double()
    torchs.double()
    torch.testing.assert_close(passed(ours, x.contiguous(memory_format=layout)), passed(torchs, x))


def test_running_statistics_equal_those_of_torch_and_serve_in_evaluation():
    ours, torchs = BatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(2)).contiguous(
        memory_format=torch.channels_last
    )
    for _ in range(3):
        ours(x)
        torchs(x)
    torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()))
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system_when_the_block_ends():
    before = resident_mib()
    with reused_memory():
        for _ in range(2):
            assert torch.ones(64 << 18).sum() == 64 << 18
    assert resident_mib() < before + 32
