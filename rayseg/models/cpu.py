"""What makes a CPU quick where PyTorch's defaults are slow; other devices are left alone."""

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.nn.utils.fusion import fuse_conv_bn_eval

MOST_THREADS = 4
_FOLDED_WITHIN = 1e-3  # of the largest output; rounding makes 1e-6 of it, a wrong order of layers 1e-1 and more


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, whose weight gradient on a CPU is a few matrix products.

    oneDNN's own kernel for it takes three times as long as the forward pass when the memory format is channels_last.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve (N, C, H, W) to (N, out_channels, H, W)."""
        few_channels = self.in_channels < 16
        if few_channels or input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        output: Tensor = _Conv3x3.apply(input, self.weight, self.bias)
        return output


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution that on a CPU is one matrix product over the pixels as they lie in channels_last."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve (N, C, H, W) to (N, out_channels, H, W)."""
        if input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x_NCHW, weight)
        return F.conv2d(x_NCHW, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # noqa: ANN401
        x_NCHW, weight = ctx.saved_tensors
        grad_NKHW = grads[0]
        to_input = None
        if ctx.needs_input_grad[0]:
            to_input = conv2d_input(x_NCHW.shape, weight, grad_NKHW, padding=1)  # type: ignore[no-untyped-call]
        return to_input, _weight_gradient(x_NCHW, grad_NKHW), grad_NKHW.sum((0, 2, 3))


def _weight_gradient(x_NCHW: Tensor, grad_NKHW: Tensor) -> Tensor:
    """Sum over pixels of gradient x shifted input: for each of the 9 shifts one matrix product per image row."""
    height, width = x_NCHW.shape[2:]
    padded = F.pad(x_NCHW, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    grad_rows = grad_NKHW.permute(0, 2, 3, 1).flatten(0, 1)
    taps = [
        torch.bmm(padded[:, i : i + height, j : j + width].flatten(0, 1).transpose(1, 2), grad_rows).sum(0)
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(taps).view(3, 3, *taps[0].shape).permute(3, 2, 0, 1)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose training on a CPU in channels_last keeps full accuracy on big images.

    PyTorch's own kernel adds up all pixels one after another in float32; here parts of the image are added up first.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise (N, C, H, W) by its own statistics in training, by the running ones otherwise."""
        last = input.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and last and input.device.type == "cpu") or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows_PC = _rows(input.detach())
        mean, variance = _statistics(rows_PC)
        self._remember(mean, variance, len(rows_PC))
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, mean, (variance + self.eps).rsqrt())
        return output

    def _remember(self, mean: Tensor, variance: Tensor, pixels: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # None is PyTorch's word for the plain average over all batches.
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (pixels / max(pixels - 1, 1)), momentum)


class _Normalise(torch.autograd.Function):
    """(x - mean) * scale * weight + bias with mean and scale taken from x itself; gradient of Ioffe & Szegedy 2015."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x_NCHW, weight, mean, scale)
        output_NCHW = torch.empty_like(x_NCHW)
        factor = weight * scale
        shift = bias - mean * factor
        for x, output in zip(_parts(_rows(x_NCHW)), _parts(_rows(output_NCHW)), strict=True):
            torch.addcmul(shift, x, factor, out=output)
        return output_NCHW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: ANN401
        x_NCHW, weight, mean, scale = ctx.saved_tensors
        pixels = x_NCHW[:, 0].numel()
        pairs = list(zip(_parts(_rows(x_NCHW)), _parts(_rows(grads[0])), strict=True))
        to_bias = torch.stack([grad.sum(0) for _, grad in pairs]).sum(0)
        to_weight = torch.stack([(x - mean).mul_(grad).sum(0) for x, grad in pairs]).sum(0) * scale
        slope = -weight * scale**2 * to_weight / pixels
        level = -weight * scale * to_bias / pixels - slope * mean
        to_input_NCHW = torch.empty_like(x_NCHW)
        for (x, grad), output in zip(pairs, _parts(_rows(to_input_NCHW)), strict=True):
            torch.addcmul(level, x, slope, out=output).addcmul_(grad, weight * scale)
        return to_input_NCHW, to_weight, to_bias, None, None


class Apart(nn.Module):
    """A model of images, in evaluation mode, that computes each image of a batch in one thread, several at a time.

    An image then has the same bits in whatever batch it comes and however many processors there are, and nobody waits
    for the slowest thread of a layer.

    Args:
        model: (1, C, H, W) -> tensor of one image.
        most: threads.
    """

    def __init__(self, model: nn.Module, *, most: int = MOST_THREADS) -> None:
        super().__init__()
        self.model = model
        self.count = min(most, os.cpu_count() or 1)
        self._pool = _single_threads(self.count)
        self._lock, self._under_way = threading.Lock(), 0
        self._helped = 1  # threads of an image that comes by itself

    @torch.inference_mode()
    def help_one(self, x_NCHW: Tensor) -> None:
        """From now on have all threads compute an image that comes by itself, if these images keep their bits so.

        A power of two of them, as elementwise kernels treat the ends of other parts of an image otherwise.
        """
        most = 1 << (self.count.bit_length() - 1)
        alone = torch.cat(list(self._pool.map(self._one, torch.split(x_NCHW, 1))))
        with threads(most):
            helped = torch.cat([self._one(x_1CHW) for x_1CHW in torch.split(x_NCHW, 1)])
        self._helped = most if bool((alone == helped).all()) else 1

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The model's outputs, one behind the other."""
        with self._lock:
            self._under_way += len(x_NCHW)
            helped = self._helped > 1 and self._under_way == 1
        try:
            if helped:
                with threads(self._helped):
                    return self._one(x_NCHW)
            return torch.cat(list(self._pool.map(self._one, torch.split(x_NCHW, 1))))
        finally:
            with self._lock:
                self._under_way -= len(x_NCHW)

    def _one(self, x_1CHW: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.model(x_1CHW)
        return found


def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads have no helpers of their own; other threads keep theirs."""
    all_there, before = threading.Barrier(count + 1), torch.get_num_threads()

    def alone() -> None:
        torch.get_num_threads()  # a new thread takes over the process's number when it is first asked, not before
        torch.set_num_threads(1)
        all_there.wait()

    pool = ThreadPoolExecutor(count, initializer=alone)
    for _ in range(count):
        pool.submit(int)
    all_there.wait()
    torch.set_num_threads(before)  # the process's number is what was set last, in whatever thread
    return pool


def folded(model: nn.Module, channels: int) -> nn.Module:
    """The model for inference: its batch normalisations folded into the convolutions before them, a tenth quicker.

    Which convolution comes before which normalisation is told by their order in a module, and then tried out: a model
    that gives something else folded is left as it is. Convolutions (`nn.Conv2d` itself, not what derives from it) are
    computed by one kernel, however many threads there are: PyTorch takes another one for 1x1 when there is one.

    Args:
        model: on the CPU, in evaluation mode; it is not changed.
        channels: of its input.
    """
    quicker = copy.deepcopy(model)
    pairs = [pair for parent in quicker.modules() for pair in _pairs(parent)]
    for parent, conv, norm in pairs:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
    for one in quicker.modules():
        if type(one) is nn.Conv2d and one.kernel_size == (1, 1) and one.padding == (0, 0):
            one.__class__ = _Steady1x1
    return quicker if _agree(model, quicker, channels) else model


class _Steady1x1(nn.Conv2d):
    """A 1x1 convolution by oneDNN, which adds up in the same order for any number of threads."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return super().forward(input)
        return torch.mkldnn_convolution(input, self.weight, self.bias, (0, 0), self.stride, self.dilation, self.groups)


def _pairs(parent: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Names of each convolution and the normalisation right behind it."""
    for (conv, one), (norm, other) in pairwise(list(parent.named_children())):
        if type(one) is nn.Conv2d and type(other) is nn.BatchNorm2d:
            yield parent, conv, norm


def _agree(one: nn.Module, other: nn.Module, channels: int) -> bool:
    sample = torch.randn((1, channels, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = one(sample), other(sample)
    return bool((found - expected).abs().max() < _FOLDED_WITHIN * expected.abs().max())


def _rows(x_NCHW: Tensor) -> Tensor:
    """The pixels (P, C) as they lie in channels_last: a view, or a copy if they lie otherwise."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(0, 2)


def _statistics(x_PC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (over P, not P - 1) of every channel."""
    mean = torch.stack([x.sum(0) for x in _parts(x_PC)]).sum(0) / len(x_PC)
    variance = torch.stack([(x - mean).square_().sum(0) for x in _parts(x_PC)]).sum(0) / len(x_PC)
    return mean, variance


def _parts(x_PC: Tensor) -> Sequence[Tensor]:
    """Runs of pixels of about 4 MB: near a processor's cache, yet few enough for threads to meet seldom."""
    return torch.split(x_PC, max(1, 2**20 // x_PC.shape[1]))


@contextmanager
def threads(most: int = MOST_THREADS) -> Iterator[None]:
    """Compute with the machine's processors, but at most so many, whatever the process was told.

    How many there are decides the order of sums, and so the last digits: it has to be the same wherever a stage runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
