"""Settings of al-s4gan and what they must fulfil before anything is written."""

from typing import Annotated

from pydantic import Field, model_validator

from rayseg.config import Config as Frozen
from rayseg.config import Workers, added
from rayseg.errors import ConfigError
from rayseg.io.class_tables import Classes
from rayseg.models.bundle import Scaling
from rayseg.models.crf import Kernels
from rayseg.pipelines.al_s4gan.chip_pool import PoolConfig
from rayseg.pipelines.al_s4gan.classifier import Common
from rayseg.pipelines.al_s4gan.queries import ActiveConfig
from rayseg.steps import models
from rayseg.steps.generalize import PolygonsConfig
from rayseg.steps.map import MapConfig
from rayseg.store import Location
from rayseg.train.classifier import ClassifierConfig
from rayseg.train.classifier import expect_trainable as expect_classifier
from rayseg.train.s4gan import S4ganConfig
from rayseg.train.s4gan import expect_trainable as expect_segmenter
from rayseg.vision.color import ClassTable


class Config(Frozen):
    """Settings of the pipeline; the defaults are the paper's where the machine allows."""

    pool: PoolConfig = PoolConfig()
    classes: Classes = Classes.model_validate("deepglobe")
    """The classes of the masks: a YAML file, its name under configs/classes, or its content."""
    active: ActiveConfig = ActiveConfig()
    segmenter: S4ganConfig | None = S4ganConfig()
    """None ends after active learning, with the accuracy of the classifier at each number of labels."""
    crf: Kernels | None = None
    """Smooths the segmenter's scores with a fully connected CRF, for the measures and the map."""
    map: MapConfig = MapConfig()
    polygons: PolygonsConfig = added(default=PolygonsConfig())
    patch: Annotated[int, Field(gt=0, multiple_of=32)] = 640
    """Side in px of the segmenter's window over the region."""
    stride: Annotated[int, Field(gt=0)] = 512
    """Distance of these windows in px; the rest of a window is margin."""
    workers: Workers = 0
    """Processes of Ray Train. 0 or auto: on a cluster one per GPU, else one; locally the command's own process."""
    seed: int = 1234
    """Random seed of the run; it replaces `active.classifier.learning.seed` and `segmenter.learning.seed`."""
    scaling: Scaling = Field(default_factory=models.scaling_of)
    """From the imagery's values to the networks' input; by default what the segmenter's encoder expects of uint8."""
    certificate: bool = added(default=True)
    """Whether the map's stability is measured at the end, on a sample of its own tiles (docs/certificate.md)."""
    truth: Location | None = None
    """Masks to measure the map with: a folder, `catalog.json#collection`, or `#collection` of the region."""
    baseline: bool = added(default=True)
    """Whether the report shows simple methods next to the segmenter, learnt and measured on the same chips."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if len(self.scaling.mean) != len(models.RGB):
            raise ValueError(f"scaling is of {len(self.scaling.mean)} bands, chips have {', '.join(models.RGB)}")
        if self.segmenter:
            reduce = self.segmenter.reduce
            models.expect_windows(models.RGB, self.scaling, patch=self.patch, stride=self.stride, reduce=reduce)
            if self.crf and self.segmenter.network != "decoder":
                raise ValueError("crf refines a decoder; set crf to null, or segmenter.network to decoder")
        return self

    @property
    def table(self) -> ClassTable:
        """Classes of the masks; without a segmenter, of the chips' own labels."""
        return self.classes.table

    @property
    def common(self) -> Common:
        """The settings that all rounds share."""
        return Common(
            kinds=self.classes,
            scaling=self.scaling,
            seed=self.seed,
            workers=self.workers,
            patience=self.map.stall_seconds,
            classifies=self.segmenter is None or (self.active.strategy != "random" and self.active.chosen is None),
        )

    def expect_trainable(self) -> None:
        """Refuse settings and weights that cannot be trained with; every network is built once.

        Raises:
            ConfigError: a setting is invalid.
            ModelError: weights are missing, or do not fit.
        """
        # Every network that will train; the classifier is not needed if chips are drawn at random.
        networks: dict[str, S4ganConfig | ClassifierConfig] = {}
        if self.segmenter:
            if self.pool.chips and not self.pool.masks:
                raise ConfigError(
                    "labelled images have no masks to train a segmenter with, expected some; name them by pool.masks, "
                    "or set segmenter to null"
                )
            expect_segmenter(self.segmenter, workers=self.workers)
            networks["segmenter"] = self.segmenter
        if self.common.classifies:
            expect_classifier(self.active.classifier, workers=self.workers)
            networks["active.classifier"] = self.active.classifier
        for name, settings in networks.items():
            if settings.size > self.pool.size and not settings.augment.pad:
                raise ConfigError(
                    f"{name}.size {settings.size} exceeds the chips' {self.pool.size} px; lower it, raise pool.size, "
                    f"or set {name}.augment.pad=true"
                )
        for settings in networks.values():
            models.expect_weights(settings, self.scaling)
        for name, settings in networks.items():
            if name == "segmenter" and self.segmenter and self.segmenter.network != "decoder":
                continue  # a head on the encoder, whose weights were read above
            # Building loads the weights: those that do not fit are refused now.
            settings.build(classes=len(self.table.classes), channels=len(models.RGB))
        if self.segmenter and self.segmenter.discriminator and self.segmenter.uses_unlabelled:
            self.segmenter.discriminator.build(classes=len(self.table.classes), channels=len(models.RGB))
