"""DeepLab v2 as the published code of al-s4gan writes it."""

from torch.nn import functional as F


def published_v2(state, image, blocks):
    """Logits of DeepLab v2, by the names and the layout of the published code: an implementation of its own."""

    def unit(x, name, *, stride=1, dilation=1, relu=True):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        norm = (state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *norm)
        return x.relu() if relu else x

    x = F.max_pool2d(unit(image, "layer1.conv1", stride=2), 3, 2, 1, ceil_mode=True)
    for layer, (count, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True), 2):
        for block in range(1, count + 1):
            name, first = f"layer{layer}.block{block}", block == 1
            h = unit(x, f"{name}.reduce", stride=stride if first else 1)
            h = unit(unit(h, f"{name}.conv3x3", dilation=dilation), f"{name}.increase", relu=False)
            x = (h + (unit(x, f"{name}.shortcut", stride=stride, relu=False) if first else x)).relu()
    parts = [
        F.conv2d(x, state[f"aspp.c{k}.weight"], state[f"aspp.c{k}.bias"], 1, rate, rate)
        for k, rate in enumerate((6, 12, 18, 24))
    ]
    return F.interpolate(sum(parts), image.shape[2:], mode="bilinear", align_corners=True)


def as_published_v2(model):
    """The network's tensors under the names of the published code."""
    names = {"conv1": "reduce.conv", "bn1": "reduce.bn", "conv2": "conv3x3.conv", "bn2": "conv3x3.bn"}
    names |= {"conv3": "increase.conv", "bn3": "increase.bn"}
    names |= {"downsample.0": "shortcut.conv", "downsample.1": "shortcut.bn"}
    state = {}
    for key, tensor in model.state_dict().items():
        parts = key.removeprefix("encoder.").split(".")
        if parts[0] == "aspp":
            name = f"aspp.c{parts[1]}.{parts[2]}"
        elif parts[0].startswith("layer"):
            name = f"layer{int(parts[0][5:]) + 1}.block{int(parts[1]) + 1}.{names['.'.join(parts[2:-1])]}.{parts[-1]}"
        else:
            name = f"layer1.conv1.{parts[0].rstrip('1')}.{parts[1]}"
        state[name] = tensor
    return state
