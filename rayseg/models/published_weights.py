"""Weights of the published codes: under which names they keep their tensors, and how those fit rayseg's networks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from rayseg.errors import ModelError
from rayseg.models.encoders import prefixes

State = dict[str, Tensor]
Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""(pattern, replacement) of names, applied in order."""

LANDCOVER: Renames = (
    *((rf"aspp\.aspp{k + 1}\.atrous_conv\.", f"aspp.branches.{k}.0.") for k in range(4)),
    *((rf"aspp\.aspp{k + 1}\.bn\.", f"aspp.branches.{k}.1.") for k in range(4)),
    (r"aspp\.global_avg_pool\.([12])\.", lambda found: f"aspp.pooled.1.{int(found[1]) - 1}."),
    (r"aspp\.conv1\.", "aspp.joined.0.0."),
    (r"aspp\.bn1\.", "aspp.joined.0.1."),
    (r"decoder\.conv1\.", "decoder.low.0."),
    (r"decoder\.bn1\.", "decoder.low.1."),
    (r"decoder\.last_conv\.([01])\.", r"decoder.mixed.0.\1."),
    (r"decoder\.last_conv\.([45])\.", lambda found: f"decoder.mixed.2.{int(found[1]) - 4}."),
    (r"decoder\.my_classify\.", "decoder.classify."),
)
"""The landcover prototype's DeepLabv3+ -> `models.deeplab`."""
_BLOCK = {"reduce": ("conv1", "bn1"), "conv3x3": ("conv2", "bn2"), "increase": ("conv3", "bn3")}
_BLOCK |= dict.fromkeys(("shortcut", "proj"), ("downsample.0", "downsample.1"))
S4GAN: Renames = (
    (r"layer1\.conv1\.conv\.", "conv1."),
    (r"layer1\.conv1\.bn\.", "bn1."),
    (
        r"layer([2-5])\.block(\d+)\.(reduce|conv3x3|increase|shortcut|proj)\.(conv|bn)\.",
        lambda found: f"layer{int(found[1]) - 1}.{int(found[2]) - 1}.{_BLOCK[found[3]][found[4] == 'bn']}.",
    ),
    (r"aspp\.c(\d)\.", r"aspp.\1."),
    (r"layer5\.conv2d_list\.(\d)\.", r"aspp.\1."),
)
"""DeepLab v2 as al-s4gan has it, and as S4GAN has it (torchvision's names) -> `models.deeplab.DeepLabV2`."""
PLOTS: Renames = (
    (r"^(?:\w+\.)?0\.weight$", "conv1.weight"),
    (r"^(?:\w+\.)?1\.(\w+)$", r"bn1.\1"),
    (r"^(?:\w+\.)?([4-7])\.(\d+)\.", lambda found: f"layer{int(found[1]) - 3}.{found[2]}."),
)
"""LiSegAgr's ResNet50, a sequence of torchvision's layers -> their names."""
_FLAT = re.compile(r"(^|\.)(stages|features|layers|blocks)\.(\d+)\.")
_LAST = 4  # tensors that may be matched by shape


@dataclass(frozen=True)
class Fitted:
    """Tensors of a file under the names of a network.

    Attributes:
        state: all tensors of the network.
        dropped: name in the file -> why it is not loaded.
        shaped: name in the network -> name in the file, for tensors that are matched by their shape alone.
    """

    state: State
    dropped: dict[str, str]
    shaped: dict[str, str] = field(default_factory=dict)


def fit(model: nn.Module, state: State, path: str, *, renames: Renames = ()) -> Fitted:
    """Find each tensor of a network in a file: its encoder's, then other parts by name, then last layers by shape.

    Args:
        model: the network, with the submodule `encoder`.
        state: tensors of the file, by name.
        path: of the file, for messages.
        renames: from the file's names to the network's.

    Raises:
        ModelError: a tensor of the network is not in the file.
    """
    wanted, names = model.state_dict(), {}
    for key in state:
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        names[name] = key
    given = {name: state[key] for name, key in names.items()}
    # 1. the encoder, whose names differ between libraries
    encoder = {key.removeprefix("encoder."): t for key, t in wanted.items() if key.startswith("encoder.")}
    places = {f"encoder.{key}": name for key, name in _places(given, encoder).items()}
    # 2. other parts
    left = {name: tensor for name, tensor in given.items() if name not in places.values()}
    places |= _places(left, {key: tensor for key, tensor in wanted.items() if key not in places})
    # 3. last layers, which every code calls otherwise
    shaped = _by_shape(wanted, given, places)
    # Weight and bias of two layers: of more, equal shapes do not determine which is which.
    places |= shaped if len(shaped) <= _LAST else {}
    missing = [key for key in wanted if key not in places and not key.endswith("num_batches_tracked")]
    if missing:
        raise ModelError(
            f"weights {path} lack {len(missing)} of the {len(wanted)} tensors of {type(model).__name__}, first "
            f"{missing[0]} {tuple(wanted[missing[0]].shape)}; expected a whole network of this kind: check --set"
        )
    loaded = {key: given[name].reshape(wanted[key].shape) for key, name in places.items()}
    counters = {key: tensor for key, tensor in wanted.items() if key not in loaded}  # of batch norms
    unused = [key for name, key in names.items() if name not in places.values()]
    dropped = dict.fromkeys(unused, "the network has no such tensor")
    return Fitted(loaded | counters, dropped, {key: names[name] for key, name in shaped.items()})


def _places(given: State, wanted: State) -> dict[str, str]:
    """Name in the network -> name in the file, for the tensors of equal shape under the prefix that fits most."""
    best: dict[str, str] = {}
    for spelled in ({name: name for name in given}, {_FLAT.sub(r"\1\2_\3.", name): name for name in given}):
        for outer in ("", "model."):
            inner = {key.removeprefix(outer): key for key in wanted if key.startswith(outer)}
            for prefix, _ in prefixes(spelled, inner).most_common(2):
                matched = {
                    inner[name.removeprefix(prefix)]: old
                    for name, old in spelled.items()
                    if name.startswith(prefix) and name.removeprefix(prefix) in inner
                }
                fitting = {key: old for key, old in matched.items() if wanted[key].shape == given[old].shape}
                best = fitting if len(fitting) > len(best) else best
    return best


def _by_shape(wanted: State, given: State, places: Mapping[str, str]) -> dict[str, str]:
    """Tensors that are left over on both sides, equally many of a shape, in their order; 1 x 1 kernels as matrices."""
    pairs: dict[str, str] = {}
    taken = set(places.values())
    open_ = [key for key in wanted if key not in places and not key.endswith("num_batches_tracked")]
    left = [name for name in given if name not in taken and not name.endswith("num_batches_tracked")]
    for shape in {_flat(wanted[key]) for key in open_}:
        ours = [key for key in open_ if _flat(wanted[key]) == shape]
        theirs = [name for name in left if _flat(given[name]) == shape]
        if len(ours) == len(theirs):
            pairs |= dict(zip(ours, theirs, strict=True))
    return pairs


def _flat(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the sides of 1 x 1 kernels."""
    shape = tuple(tensor.shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
