"""Layers and settings that are faster on CPUs than PyTorch's defaults; other devices use the defaults."""

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
_FOLDED_WITHIN = 1e-3  # of the largest output; rounding changes 1e-6 of it, a wrong order of layers 1e-1 and more


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, whose weight gradient on a CPU is computed by matrix products.

    In channels_last, oneDNN's own kernel for this gradient takes three times as long as the forward pass.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve (N, C, H, W) to (N, out_channels, H, W)."""
        # With few channels the matrix products are too thin to pay off.
        few_channels = self.in_channels < 16
        if few_channels or input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        output: Tensor = _Conv3x3.apply(input, self.weight, self.bias)
        return output


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution that on a CPU is one matrix product over the pixels in channels_last order."""

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
    """Batch normalisation whose training on a CPU in channels_last is accurate on large images.

    PyTorch's own kernel sums all pixels one after another in float32; here parts of the image are summed first.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalise (N, C, H, W) by its own statistics in training, else by the running ones."""
        last = input.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and last and input.device.type == "cpu") or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows_PC = _rows(input.detach())
        # 1. mean and variance (over P, not P - 1) of every channel
        pixels = len(rows_PC)
        mean = torch.stack([x.sum(0) for x in _parts(rows_PC)]).sum(0) / pixels
        variance = torch.stack([(x - mean).square_().sum(0) for x in _parts(rows_PC)]).sum(0) / pixels
        # 2. the running statistics, as PyTorch updates them; a momentum of None is the plain average over all batches
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * (pixels / max(pixels - 1, 1)), momentum)
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, mean, (variance + self.eps).rsqrt())
        return output


class _Normalise(torch.autograd.Function):
    """(x - mean) * scale * weight + bias, where mean and scale depend on x; gradient: Ioffe & Szegedy 2015, sec. 3."""

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
        # The gradient to x is linear in x and the output's gradient: level + slope x + weight scale grad.
        slope = -weight * scale**2 * to_weight / pixels
        level = -weight * scale * to_bias / pixels - slope * mean
        to_input_NCHW = torch.empty_like(x_NCHW)
        for (x, grad), output in zip(pairs, _parts(_rows(to_input_NCHW)), strict=True):
            torch.addcmul(level, x, slope, out=output).addcmul_(grad, weight * scale)
        return to_input_NCHW, to_weight, to_bias, None, None


class Apart(nn.Module):
    """A model of images, in evaluation mode, that computes each image of a batch in one thread, several at a time.

    The result of an image is then bit-equal in any batch and on any number of processors, and no layer waits for its
    slowest thread.

    Args:
        model: (1, C, H, W) -> tensor of one image.
        most: number of threads.
    """

    def __init__(self, model: nn.Module, *, most: int = MOST_THREADS) -> None:
        super().__init__()
        self.model = model
        self.count = min(most, os.cpu_count() or 1)
        self._pool = _single_threads(self.count)
        self._lock, self._under_way = threading.Lock(), 0
        self._helped = 1  # threads of a single image

    @torch.inference_mode()
    def help_one(self, x_NCHW: Tensor) -> None:
        """Use all threads for a single image from now on, if these images are bit-equal that way.

        The number of threads is a power of two: elementwise kernels round the ends of other parts differently.
        """
        most = 1 << (self.count.bit_length() - 1)  # the largest power of two
        alone = torch.cat(list(self._pool.map(self._one, torch.split(x_NCHW, 1))))
        with threads(most):
            helped = torch.cat([self._one(x_1CHW) for x_1CHW in torch.split(x_NCHW, 1)])
        self._helped = most if bool((alone == helped).all()) else 1

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The model's outputs, concatenated."""
        with self._lock:
            self._under_way += len(x_NCHW)
            # Threads that help would take the processors of other images in progress.
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
        with torch.inference_mode():  # it holds for one thread, so each of the pool enters its own
            output: Tensor = self.model(x_1CHW)
        return output


def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool of threads in which PyTorch computes with one thread; other threads keep their number."""
    ready, before = threading.Barrier(count + 1), torch.get_num_threads()

    def alone() -> None:
        torch.get_num_threads()  # a new thread takes the process's number at its first call, so call before setting it
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(count, initializer=alone)
    for _ in range(count):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(before)  # the process's number is the one set last, in any thread
    return pool


def folded(model: nn.Module, channels: int) -> nn.Module:
    """The model for inference, with batch normalisations folded into the convolutions before them: 10 % faster.

    A normalisation is paired with the convolution before it in the module, and the result is compared: a model that
    gives other outputs folded is returned unchanged. Convolutions (`nn.Conv2d` itself, not its subclasses) use one
    kernel for any number of threads: PyTorch uses another one for 1x1 with a single thread.

    Args:
        model: on the CPU, in evaluation mode; not modified.
        channels: of its input.
    """
    quicker = copy.deepcopy(model)
    # 1. fold each normalisation right behind a convolution
    for parent in list(quicker.modules()):
        for (first, conv), (second, norm) in pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    # 2. one kernel for all 1x1 convolutions
    for layer in quicker.modules():
        if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.padding == (0, 0):
            layer.__class__ = _Steady1x1
    # 3. compare
    sample = torch.randn((1, channels, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = model(sample), quicker(sample)
    equal = (actual - expected).abs().max() < _FOLDED_WITHIN * expected.abs().max()
    return quicker if bool(equal) else model


class _Steady1x1(nn.Conv2d):
    """A 1x1 convolution by oneDNN, which sums in the same order for any number of threads."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return super().forward(input)
        return torch.mkldnn_convolution(input, self.weight, self.bias, (0, 0), self.stride, self.dilation, self.groups)


def _rows(x_NCHW: Tensor) -> Tensor:
    """The pixels (P, C) in channels_last order: a view, or a copy of another memory format."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(0, 2)


def _parts(x_PC: Tensor) -> Sequence[Tensor]:
    """Runs of pixels of about 4 MB: close to a processor's cache, and few enough for threads to synchronise rarely."""
    return torch.split(x_PC, max(1, 2**20 // x_PC.shape[1]))


@contextmanager
def threads(most: int = MOST_THREADS) -> Iterator[None]:
    """Compute with the machine's processors, at most `most`, whatever the process's setting.

    The number of threads decides the order of sums and so the last digits: it must be the same wherever a stage runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
