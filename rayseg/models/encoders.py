"""Encoders: their names, their pretrained weights, and how their batch norms work on few chips."""

import difflib
import logging
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from zipfile import ZipFile, is_zipfile

import segmentation_models_pytorch as smp
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from rayseg.errors import ConfigError, ModelError
from rayseg.models.pretrained_weights import NO_FILES, PACKAGED, chosen, local_file, packaged_state

State = dict[str, Tensor]
_log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "params", "params_ema")
_DEEPEST = 6
"""Parts of a key that wrappers can add: `module.model.backbone.encoder.` has four."""
_REFUSED = re.compile(r"unsupported|can only|trying to call reduce|torchscript", re.IGNORECASE)
"""Torch's messages about objects that are not tensors, in a file that is not damaged."""
_OBJECT = re.compile(r"GLOBAL (\S+)|got (<class '[^']+'>)|(TorchScript)")
_HEADS = {"classifier", "fc", "head", "head_fc", "last_linear", "conv_head", "bn2", "norm", "norm_head", "final_conv"}
_CANNOT_BUILD = (KeyError, ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, AssertionError)


def encoder_name(name: str) -> str:
    """The name segmentation_models_pytorch knows `name` by: its own, or timm's with the prefix `tu-`.

    A name in both libraries means segmentation_models_pytorch's encoder; `tu-<name>` means timm's.

    Raises:
        ConfigError: neither library has it; the message offers close matches.
    """
    bare = name.removeprefix("timm-").removeprefix("tu-")
    if name in smp.encoders.encoders:
        return name
    for candidate in (bare, f"tf_{bare}"):
        if timm.is_model(candidate):
            return f"tu-{candidate}"
    known = sorted({*smp.encoders.encoders, *timm.list_models()})
    close = difflib.get_close_matches(bare, known, n=4, cutoff=0.5)
    near = f"did you mean {', '.join(close)}?" if close else "see timm.list_models() for the names"
    raise ConfigError(f"encoder {name!r} is neither in segmentation_models_pytorch nor in timm; {near}")


def pretrained_name(encoder: str, weights: str) -> str | bool | None:
    """The `encoder_weights` argument of segmentation_models_pytorch for `weights`; files are loaded afterwards."""
    if weights != "imagenet":
        return None
    return True if encoder.startswith("tu-") else "imagenet"


def build_encoder(encoder: str, *, channels: int = 3, stride: int = 32, weights: str = "imagenet") -> nn.Module:
    """An encoder: images_NCHW -> list of 6 feature maps, the first being the images, the k-th 1/2^k of their size.

    Args:
        encoder: a name of segmentation_models_pytorch or of timm.
        channels: bands of the images.
        stride: pixels per position of the last feature map; 16 or 8 if the encoder supports dilation.
        weights: "imagenet" (downloaded), "packaged", "none" (random), or a `.pth`, `.pt` or `.safetensors` file or URL.

    Raises:
        ConfigError: the encoder is unknown or has no feature maps.
        ModelError: the weights are missing or do not fit.
    """
    name, weights = encoder_name(encoder), chosen(encoder, weights)
    with built(encoder, weights):
        model: nn.Module = smp.encoders.get_encoder(
            name, in_channels=channels, output_stride=stride, weights=pretrained_name(name, weights)
        )
    load_encoder_weights(model, weights, encoder)
    return model


def build_imagenet(name: str, *, channels: int = 3, weights: str = "imagenet") -> nn.Module:
    """A whole network of timm: images_NCHW -> the 1000 logits of ImageNet.

    Args:
        name: of timm, with or without its prefixes here (`tu-`, `timm-`).
        channels: bands of the images.
        weights: "imagenet" (downloaded), "packaged", "none" (random), or a file with all of its tensors.

    Raises:
        ConfigError: timm has no such network.
        ModelError: the weights are missing or do not fit.
    """
    bare = name.removeprefix("timm-").removeprefix("tu-")
    if not timm.is_model(bare):
        # timm has over a thousand names, so the nearest ones help more than the list.
        close = difflib.get_close_matches(bare, timm.list_models(), n=4, cutoff=0.5)
        near = f"did you mean {', '.join(close)}?" if close else "see timm.list_models() for the names"
        raise ConfigError(f"network {name!r} is not in timm; {near}")
    weights = chosen(name, weights)
    with built(name, weights):
        model: nn.Module = timm.create_model(
            bare, pretrained=weights == "imagenet", num_classes=1000, in_chans=channels
        )
    load_encoder_weights(model, weights, bare)
    return model


@contextmanager
def built(what: str, weights: str) -> Iterator[None]:
    """Build a model `what` with a library, whose errors have many kinds.

    Raises:
        ConfigError: the combination is invalid.
        ModelError: there are no weights.
    """
    try:
        with warnings.catch_warnings():
            # The libraries warn of their own deprecated calls.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except (OSError, *_CANNOT_BUILD) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, OSError) or "pretrained" in reason.lower():
            raise ModelError(
                f"imagenet weights of {what} are not available ({reason}); "
                "set weights to a local .pth or .safetensors file, or to none, or take an encoder with packaged "
                f"weights: {', '.join(PACKAGED)}"
            ) from None
        raise ConfigError(
            f"{what} cannot be built with weights {weights!r}: {reason}; choose another encoder"
        ) from None


def load_encoder_weights(encoder: nn.Module, weights: str, name: str = "") -> None:
    """Load the file `weights` into `encoder`, all of it; only a classification head in the file is ignored.

    "packaged" loads the weights of the encoder called `name`; "imagenet" and "none" load nothing. Keys of files may be
    torchvision's, timm's or segmentation_models_pytorch's, also those of a whole model and of what it was trained in
    (`encoder.*`, Lightning's `model.*`, `module.*`). A first convolution for 3 bands is adapted to the encoder's bands.

    Raises:
        ModelError: the file cannot be read, or is of another architecture.
    """
    if weights in NO_FILES - {"packaged"}:
        return
    wanted = encoder.state_dict()
    content = packaged_state(name) if weights == "packaged" else read_state(weights)
    # Of all ways the libraries spell the keys, the one with most matching tensors.
    spellings = _spellings(content, wanted, weights)
    state = max(spellings, key=lambda spelled: len(_fitting(spelled, wanted)))
    fitting = _fitting(state, wanted)
    if others := len(content) - len(state):
        _log.warning(
            "weights %s: %d of %d tensors are not the encoder's and are not loaded; `rayseg models import` and "
            "segmenter.start take a whole network",
            weights,
            others,
            len(content),
        )
    missing = [key for key in wanted if key not in fitting and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in wanted and key.removeprefix("model.").partition(".")[0] not in _HEADS]
    if missing or surplus:
        first = f"{missing[0]} is missing or of another shape" if missing else f"{surplus[0]} is not in it"
        raise ModelError(
            f"weights {weights} fit {len(fitting)} of the {len(wanted)} tensors of {type(encoder).__name__} ({first}); "
            "use weights of the same encoder, or none"
        )
    encoder.load_state_dict(fitting, strict=False)


def read_state(path: str) -> State:
    """The tensors of `read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str) -> tuple[State, list[str]]:
    """The tensors by name in a file of safetensors or a checkpoint of torch (a path or URL); nothing else is unpickled.

    The content decides which of both a file is, not its name.

    Of a training checkpoint these are the tensors of its `state_dict` (or `model`, `params`, ...); if it has none, all
    tensors in dicts of dicts, with names such as `net.conv.weight`.

    Returns:
        The tensors, and the names of what lies next to them, such as epoch and optimizer.

    Raises:
        ModelError: the file is missing or damaged, contains other objects, no tensors by name, or NaN or infinity.
    """
    file = local_file(path)
    try:
        data = file.read_bytes()
        if data[8:9] == b"{":  # safetensors: the length of a JSON object, and the object
            content: Any = load(data)
        else:
            content = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"weights {path} cannot be read: {error.strerror or error}; check the path") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise _unreadable(path, data, " ".join(str(error).split())) from None
    aside: list[str] = []
    # Checkpoints nest: Lightning's `state_dict`, MAE's `model`, BasicSR's `params_ema`.
    for wrapper in _WRAPPERS:
        inner = content.get(wrapper) if isinstance(content, dict) else None
        if isinstance(inner, dict):
            aside += [str(name) for name in content if name != wrapper]
            content = inner
    if not (state := _named_tensors(content)):
        raise ModelError(f"weights {path} contain no tensors by name, expected a state dict; save model.state_dict()")
    wide = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.itemsize > 1}
    if spoilt := [name for name, tensor in wide.items() if not tensor.isfinite().all()]:
        raise ModelError(
            f"weights {path} have NaN or infinity in {len(spoilt)} of {len(state)} tensors (first {spoilt[0]}), "
            "expected finite numbers; take weights from before the training diverged"
        )
    return state, aside


def _unreadable(path: str, data: bytes, reason: str) -> ModelError:
    """The error for a file that torch does not load: damaged, or with objects other than tensors."""
    if kind := _other_kind(data):
        return ModelError(f"weights {path} ({len(data)} bytes) are not weights, but {kind}")
    # Other bytes than those of a zip archive or a pickle are "unsupported" for torch, too.
    if not data.startswith((b"PK", b"\x80")) or not _REFUSED.search(reason):
        return ModelError(
            f"weights {path} ({len(data)} bytes) are damaged or not weights, 0 tensors read: "
            f"{reason.partition('. ')[0][:200]}; download the file again"
        )
    named = _OBJECT.search(reason)
    name = next((name for name in named.groups() if name), "") if named else ""
    return ModelError(
        f"weights {path} contain an object that is not a tensor{f' ({name})' if name else ''}, which is not loaded "
        "because it could run code, expected a dict of tensors; save the state dict alone where you trust the file, "
        "as torch.save(model.state_dict(), NEW) or torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
    )


def _other_kind(data: bytes) -> str:
    """What a file is that holds no weights itself, and what to do; "" for others."""
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; fetch the file with git lfs pull"
    if data.lstrip().startswith(b"<"):
        return "a web page; download the file itself"
    if data.startswith(b"\x1f\x8b"):
        return "a gzip archive; unpack it"
    names = ZipFile(BytesIO(data)).namelist() if is_zipfile(BytesIO(data)) else []
    if not names or any(name.endswith("data.pkl") for name in names):  # a checkpoint of torch is a zip archive too
        return ""
    return f"an archive of {names[0]}; unpack it, and convert arrays of NumPy with torch.save"


def _named_tensors(content: object) -> State:
    """The tensors in dicts, by their keys joined with dots; dicts with other keys than texts are left out."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return {}
    state: State = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            state[key] = value
        else:
            state |= {f"{key}.{name}": tensor for name, tensor in _named_tensors(value).items()}
    return state


def unwrapped(state: State, wanted: Collection[str], path: str) -> State:
    """The tensors under the prefix (`module.`, `model.encoder.`, ...) under which most of the wanted names are.

    Args:
        state: tensors by name.
        wanted: names of the tensors of a network.
        path: of the file, for a warning that several copies of the network are in it.
    """
    counts = prefixes(state, wanted)
    if not counts:
        return state
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    if len(best) > 1 and most > len(wanted) / 2:  # a student and its teacher, for example
        _log.warning(
            "weights %s hold the network as %s: %s is loaded", path, " and ".join(best), best[0] or "the first"
        )
    return {key.removeprefix(best[0]): tensor for key, tensor in state.items() if key.startswith(best[0])}


def prefixes(names: Iterable[str], wanted: Container[str]) -> Counter[str]:
    """The prefixes, "" included, under which wanted names are among `names`, each with their number."""
    return Counter(
        f"{'.'.join(parts[:depth])}." if depth else ""
        for name in names
        for parts in [name.split(".")]
        for depth in range(min(len(parts), _DEEPEST + 1))
        if ".".join(parts[depth:]) in wanted
    )


def _spellings(state: State, wanted: State, path: str) -> list[State]:
    """The tensors under the names that the libraries use for them."""
    # timm's feature extractors write stages_0 for stages.0, and segmentation_models_pytorch keeps them in `model`
    flat = {re.sub(r"(^|\.)(stages|features|layers|blocks)\.(\d+)\.", r"\1\2_\3.", key): t for key, t in state.items()}
    spelled = []
    for named in [state, flat] if flat.keys() != state.keys() else [state]:
        for outer in ("", "model."):
            names = {key.removeprefix(outer) for key in wanted if key.startswith(outer)}
            spelled.append({outer + key: tensor for key, tensor in unwrapped(named, names, path).items()})
    return spelled


def _fitting(state: State, wanted: State) -> State:
    """The tensors of `state` that fit into `wanted`, with the first convolution adapted to its bands."""
    fitting = {}
    for key, tensor in state.items():
        target = wanted.get(key)
        if target is None:
            continue
        adapted = tensor
        # Only the first convolution depends on the bands: timm repeats its kernels for red, green and blue.
        kernels = tensor.ndim == target.ndim == 4 and tensor[:, 0].shape == target[:, 0].shape
        if kernels and tensor.shape[1] == 3 != target.shape[1]:
            adapted = timm.models.adapt_input_conv(target.shape[1], tensor)
        if adapted.shape == target.shape:
            fitting[key] = adapted
    return fitting


def freeze_batchnorm(model: nn.Module) -> None:
    """Make every batch norm use its running statistics without updating them; call it after `model.train()`.

    On few chips the statistics of pretraining are better than those of a batch; scale and shift still learn.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by the plain average over `batches` (images_NCHW).

    All other modules are in evaluation mode, so dropout does not shift the statistics. The mode of `model` is restored.
    """
    # Statistics of training batches are those of augmented windows and of earlier weights.
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    for images_NCHW in batches:
        model(images_NCHW)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes:
        module.training = training


def averaged(model: nn.Module, *, decay: float) -> AveragedModel:
    """An exponential moving average of the weights and buffers of `model`; call `update_parameters(model)` per step.

    The decay starts low, min(decay, (1 + n) / (10 + n)) at update n, so that the random initial weights do not dominate
    a short training.
    """

    def average(means: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        n = float(updates)
        kept = min(decay, (1 + n) / (10 + n))
        for mean, value in zip(means, values, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - kept)
            else:
                mean.copy_(value)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
