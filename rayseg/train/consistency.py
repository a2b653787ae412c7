"""Weak-to-strong consistency: a segmenter learns from few masks, and from pixels that its own average is sure of.

    <prefix>/checkpoint.pt    student and teacher after every `checkpoint` steps, and the best teacher so far

    weak view ---> teacher ---> classes of its sure pixels
    two strong views, of complementary channels ---> student ---> cross-entropy against these classes

UniMatch V2 (Yang, Zhao & Zhao 2024, arXiv 2410.10777); docs/al-s4gan.md lists the differences. Random numbers and
batches are functions of the seed and the step, as in `s4gan`. The teacher is evaluated and kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn

from rayseg.models.bundle import Scaling
from rayseg.models.discriminator import poly
from rayseg.models.losses import IGNORE, cross_entropy_sum, mass
from rayseg.train import probe, s4gan, session
from rayseg.train.augment import augment, cut_mix
from rayseg.train.learning import Learner
from rayseg.train.s4gan import ConsistencyConfig, Data, S4ganConfig
from rayseg.train.session import Setup, State

Pair = tuple[Tensor, Tensor]
"""images_NCHW with values as they were read, classes_NHW int64 (255 = unknown)."""


@dataclass
class Student:
    """A student, the average of its weights as teacher, and how sure the teacher is of each class.

    Attributes:
        learner: its `shown` is the teacher.
        sure_K: moving average of the teacher's probability of the pixels it gives to a class; 1 at first.
    """

    learner: Learner
    sure_K: Tensor


def fit_consistency(settings: S4ganConfig, data: Data, setup: Setup, *, scaling: Scaling) -> dict[str, float]:
    """Train a segmenter as `fit_s4gan` does, with the same arguments and errors, by consistency with a teacher."""
    return s4gan.fit_by(_train, settings, data, setup, scaling=scaling, name="consistency")


def _train(config: State) -> State:
    settings: S4ganConfig = config["settings"]
    data = s4gan.in_memory(config["data"], settings.learning.memory)
    # The decay of the teacher rises from a low value, as published, where it is min(1 - 1 / (n + 1), .996) at step n.
    average = settings.learning.average or settings.consistency.teacher
    learning = settings.learning.model_copy(update={"average": average})
    settings = settings.model_copy(update={"learning": learning})
    device = session.device_of(config)
    config = config | {"device": device, "data": data, "settings": settings}
    state = session.load_checkpoint(config["prefix"], config["key"])
    torch.manual_seed(learning.seed)
    shape = {"classes": data.labelled.count, "channels": data.labelled.read(0).shape[2]}
    net = settings.build(**shape, weights="none" if state else None)
    learner = Learner.start(net, learning, device, s4gan.groups_of(net, settings))
    student = Student(learner, torch.ones(shape["classes"], device=device))
    if state:
        learner.resume(state["learner"])
        student.sure_K.copy_(state["sure"])
        learner.note_kept(config["prefix"], state["epoch"])
    steps = partial(_steps, student=student, config=config)
    return s4gan.run_checkpoints(steps, learner, state, config, more=lambda: {"sure": student.sure_K.cpu()})


def _steps(first: int, student: Student, config: State) -> dict[str, float]:
    """Make the steps up to the next checkpoint; return the mean of each loss."""
    settings: S4ganConfig = config["settings"]
    data: Data = config["data"]
    last = min(first + settings.checkpoint, settings.steps)
    generator = session.seed_epoch(settings.learning.seed, first)
    sources = [part for part in (data.labelled, data.unlabelled) if part]
    streams = [s4gan.stream(name, first, last, config) for name in ("labelled", "unlabelled")[: len(sources)]]
    # Weak views keep their colours, as published.
    weak = settings.model_copy(update={"augment": settings.augment.model_copy(update={"jitter": 0.0})})
    student.learner.train_mode()
    losses: dict[str, list[float]] = {}
    for step, batches in enumerate(probe.batches(zip(*streams, strict=True), last - first), first):
        shown, masks = s4gan.augmented(batches[0], generator, config)
        assert masks is not None
        plain = [s4gan.augmented(batch, generator, config | {"settings": weak}) for batch in batches[1:]]
        taught = teach(*plain[0], student, generator, config) if plain else None
        items = partial(s4gan.names_in, sources, batches)
        for name, loss in _step(step, (shown, masks), taught, student, config, items).items():
            losses.setdefault(name, []).append(loss)
    return {name: float(np.mean(values)) for name, values in losses.items()}


@torch.no_grad()
def teach(
    images_NCHW: Tensor, beyond_NHW: Tensor | None, student: Student, generator: Generator, config: State
) -> tuple[Pair, Pair]:
    """The strong views of weak views, and what the teacher is sure of; updates how sure it is of each class.

    Pixels where `beyond_NHW` is 255 lie outside the images and teach nothing.
    """
    settings: ConsistencyConfig = config["settings"].consistency
    teacher, parts = student.learner.shown.eval(), torch.split(images_NCHW, student.learner.micro or len(images_NCHW))
    p_NKHW = torch.cat([s4gan.logits_of(teacher, part, config).softmax(dim=1) for part in parts])
    sure_NHW, classes_NHW = p_NKHW.max(dim=1)
    inside_NHW = torch.ones_like(classes_NHW, dtype=torch.bool) if beyond_NHW is None else beyond_NHW != IGNORE
    student.sure_K = _renewed(student.sure_K, sure_NHW[inside_NHW], classes_NHW[inside_NHW], settings.momentum)
    # As in FlexMatch (Zhang et al. 2021, eq. 7), with the mean probability of a class instead of its pixel count, which
    # would call a rare class a hard one.
    threshold_K = settings.threshold * student.sure_K / student.sure_K.max()
    classes_NHW[(sure_NHW < threshold_K[classes_NHW]) | ~inside_NHW] = IGNORE

    def view() -> Pair:
        coloured, _ = augment(images_NCHW, None, settings.views, generator, size=images_NCHW.shape[-1])
        return cut_mix(coloured, classes_NHW, generator, share=settings.mix)

    return view(), view()


def _renewed(sure_K: Tensor, sure_N: Tensor, classes_N: Tensor, momentum: float) -> Tensor:
    """The moving average of the probability of each class's pixels, over all workers; a class without stays."""
    count = len(sure_K)
    pixels_K = torch.bincount(classes_N, minlength=count).float()
    sums_K = torch.bincount(classes_N, sure_N, minlength=count)
    sums_K, pixels_K = session.sum_over_workers(torch.stack([sums_K, pixels_K]))
    return torch.where(pixels_K > 0, sure_K.lerp(sums_K / pixels_K.clamp(min=1), 1 - momentum), sure_K)


# -- the student -------------------------------------------------------------------------------------------------------


def _step(
    step: int,
    labelled: Pair,
    taught: tuple[Pair, Pair] | None,
    student: Student,
    config: State,
    items: Callable[[], str],
) -> dict[str, float]:
    """Make one step of the student, and so of the teacher; return the losses."""
    settings: S4ganConfig = config["settings"]
    share = session.batch_share(mass(labelled[1]))
    rate = poly(settings.rate, step, settings.steps, power=settings.power, every=settings.every)
    parts: list[tuple[float, float]] = []
    loss_of = partial(_loss_of, labelled, taught, share, student.learner.net, config, parts)
    loss = student.learner.step(loss_of, len(labelled[0]), rate, items=items, what=f"consistency, step {step}")
    supervised, consistency = (sum(values) for values in zip(*parts, strict=True))
    sure = float((taught[0][1] != IGNORE).float().mean()) if taught else 0.0
    return {"loss": loss, "ce_loss": supervised, "consistency_loss": consistency, "taught": sure}


def _loss_of(
    labelled: Pair,
    taught: tuple[Pair, Pair] | None,
    share: Tensor,
    net: nn.Module,
    config: State,
    parts: list[tuple[float, float]],
    part: slice,
) -> Tensor:
    """What a part of the batches adds to the loss."""
    if not part.start:
        parts.clear()  # a step begins again where memory was short
    images, masks = labelled
    supervised: Tensor = cross_entropy_sum(s4gan.logits_of(net, images[part], config), masks[part]) * share
    if taught is None:
        parts.append((float(supervised.detach()), 0.0))
        return supervised
    # Unsure pixels add nothing and count in the mean over all pixels of both views, as published.
    views, classes = (torch.cat([one[part] for one in both]) for both in zip(*taught, strict=True))
    with complementary_channels(net):
        logits = s4gan.logits_of(net, views, config)
    consistency: Tensor = cross_entropy_sum(logits, classes) / (2 * taught[0][1].numel())
    parts.append((float(supervised.detach()), float(consistency.detach())))
    weight = config["settings"].consistency.weight
    loss: Tensor = (supervised + weight * consistency) / (1 + weight)
    return loss


@contextmanager
def complementary_channels(net: nn.Module) -> Iterator[None]:
    """Inside this block the two halves of a batch, views of the same images, see complementary channels of features."""
    hook = net.get_submodule("encoder").register_forward_hook(lambda _net, _images, maps: _complementary(maps))
    try:
        yield
    finally:
        hook.remove()


def _complementary(maps: Sequence[Tensor]) -> list[Tensor]:
    """Feature maps times 0 or 2 by channel, in the second half of the batch 2 or 0; the first map is the images.

    As published, half of the images keep all channels.
    """
    count = len(maps[0]) // 2
    whole = torch.randperm(count)[: count // 2]
    dropped = []
    for map_NCHW in maps[1:]:
        factor_NC = 2.0 * torch.randint(0, 2, (count, map_NCHW.shape[1]))
        factor_NC[whole] = 1.0
        both_NC = torch.cat([factor_NC, 2 - factor_NC]).to(map_NCHW)
        dropped.append(map_NCHW * both_NC[..., None, None])
    return [maps[0], *dropped]
