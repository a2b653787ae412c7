"""The numbers of the published methods stand in configs/*/paper.yaml, as far as a key has them."""

from functools import reduce
from pathlib import Path

import pytest

from rayseg.config import load
from rayseg.models.deeplab import MULTI_GRID, RATES, RATES_V2
from rayseg.models.unsupervised import RECIPES
from rayseg.pipelines import pipeline_of
from rayseg.train.segmenter import SegmenterConfig

CONFIGS = Path(__file__).parents[1] / "configs"
IMAGENET = (123.675, 116.28, 103.53)
# Key -> value, as the papers and their codes state them; a line is a section of each method.
NUMBERS = {
    # Cao & Huang 2022, ISPRS 188, 157-176
    "gpc": {
        "scaling.mean": (98.3519, 96.9567, 95.5713),
        "scaling.std": (52.7343, 45.8798, 44.3465),
        "chips.size": 512,
        "chips.held_out": 0.4,
        "chips.seed": 1337,
        "classifier.encoder": "regnety_040",
        "classifier.weights": "imagenet",
        "classifier.dropout": 0.2,
        "classifier.pooling": "average",
        "classifier.positive": 0,
        "classifier.learning.batch": 12,
        "classifier.learning.optimizer": "adam",
        "classifier.learning.seed": 1337,
        "classifier.epochs": 80,
        "classifier.rates": ((40, 1e-3), (60, 1e-4), (80, 1e-5)),
        "classifier.augment.crop": "centre",
        "classifier.augment.flip": 0.5,
        "classifier.augment.quadrants": 0.5,
        "classifier.augment.rotate": 0.5,
        "classifier.size": 512,
        "classifier.augment.jitter": 0.0,
        "cues.method": "cam",
        "cues.layer": -1,
        "cues.flip": False,
        "cues.network": "v1",
        "cues.iterations": 64,
        "cues.min_labels": 4,
        "cues.objects": "labels",
        "cues.seed": 1943,
        "segmenter.architecture": "unet",
        "segmenter.encoder": "regnety_040",
        "segmenter.loss": "bce_ssim_iou",
        "segmenter.learning.batch": 6,
        "segmenter.learning.optimizer": "adam",
        "segmenter.labelling.above": 0.5,
        "segmenter.warm_up.epochs": 10,
        "segmenter.warm_up.rates": ((10, 1e-3),),
        "segmenter.correction.epochs": 20,
        "segmenter.correction.relabel": "every epoch",
        "segmenter.correction.cue_weight": 0.2,
        "segmenter.scratch.epochs": 35,
        "segmenter.scratch.restart": True,
        "segmenter.scratch.rates": ((15, 1e-3), (30, 1e-4), (35, 1e-5)),
        "segmenter.scratch.best": "accuracy",
        "segmenter.negatives": 0.0,
        "segmenter.augment.quadrants": 0.5,
        "members": 1,
        "appearance": None,
    },
    # LiSegAgr / AgriSeIS, ICONIP; segment-anything's defaults
    "agri": {
        "proposer": "sam",
        "sam.variant": "vit_h",
        "sam.points": 32,
        "sam.iou": 0.88,
        "sam.stability": 0.95,
        "sam.nms": 0.7,
        "sam.crop_layers": 0,
        "rounds.left": 0.05,
        "rounds.duplicate": 0.8,
        "rounds.least": 50,
        "rounds.refining.least": 10_000,
        "rounds.refining.edges": 0.4,
        "rounds.refining.entropy": 6.0,
        "rounds.refining.white": 0.9,
        "rounds.refining.duplicate": 0.9,
        "rounds.refining.overlap": 0.6,
        "training.network": "plots",
        "training.encoder": "resnet50",
        "training.size": 224,
        "training.epochs": 10,
        "training.learning.batch": 32,
        "training.learning.optimizer": "sgd",
        "training.learning.weight_decay": 0.1,
        "training.rates": ((10, 1e-4),),
    },
    # Desai & Ghose 2022, WACV; Mittal et al. 2019; UC Merced
    "al-s4gan": {
        "seed": 1234,
        "active.ratio": 0.02,
        "active.alpha": 0.5,
        "active.beta": 0.9,
        "active.strategy": "entropy",
        "active.classifier.network": "over-imagenet",
        "active.classifier.encoder": "resnet101",
        "active.classifier.rates": ((50, 1e-3),),
        "active.classifier.learning.optimizer": "sgd",
        "active.classifier.learning.batch": 4,
        "active.classifier.epochs": 50,
        "active.frozen": False,
        "active.classifier.augment.flip": 0.0,
        "active.classifier.augment.scale": (1.0, 1.0),
        "segmenter.architecture": "deeplabv2",
        "segmenter.encoder": "resnet101",
        "segmenter.size": 320,
        "segmenter.learning.batch": 10,
        "segmenter.steps": 20_000,
        "segmenter.checkpoint": 100,
        "segmenter.augment.scale": (0.5, 1.6),
        "segmenter.augment.mirror": "horizontal",
        "segmenter.augment.flip": 0.5,
        "segmenter.augment.quadrants": 0.0,
        "segmenter.augment.rotate": 0.0,
        "segmenter.augment.crop": "random",
        "segmenter.augment.pad": True,
        "segmenter.learning.optimizer": "sgd",
        "segmenter.rate": 2.5e-4,
        "segmenter.head_rate": 10.0,
        "segmenter.bias_rate": 20.0,
        "segmenter.learning.weight_decay": 5e-4,
        "segmenter.power": 0.9,
        "segmenter.every": 10,
        "segmenter.discriminator.width": 64,
        "segmenter.discriminator.dropout": 0.5,
        "segmenter.discriminator.rate": 1e-4,
        "segmenter.discriminator.match": 0.1,
        "segmenter.discriminator.teach": 1.0,
        "segmenter.discriminator.threshold": 0.8,
        "segmenter.discriminator.after": 1000,
        "crf.iterations": 10,
        "crf.near": 1.0,
        "crf.near_weight": 3.0,
        "crf.alike": 1.0,
        "crf.color": 67.0,
        "crf.alike_weight": 4.0,
    },
    # Chen et al. 2022, IEEE GRSL 19
    "superpixel": {
        "superpixels.method": "felzenszwalb",
        "superpixels.scale": 32,
        "superpixels.sigma": 0.5,
        "superpixels.min_size": 64,
        "network.network": "deepnet",
        "network.labels": 32,
        "network.epochs": 10,
        "network.patch": 512,
        "network.stride": 448,
        "network.reduce": 1,
        "network.seed": 2021,
        "network.start": None,
        "network.merge_to": None,
        "network.patches": None,
        "network.recalibrate": False,
        "sieve": 20,
        "scaling": "range",
    },
    # The landcover prototype, DeepGlobe 2018
    "landcover": {
        "segmenter.architecture": "deeplab",
        "segmenter.encoder": "resnet50",
        "segmenter.epochs": 400,
        "segmenter.schedule.kind": "poly",
        "segmenter.schedule.power": 0.9,
        "segmenter.schedule.rate": 0.1,
        "segmenter.learning.encoder_rate": 0.1,
        "segmenter.learning.optimizer": "sgd",
        "segmenter.learning.weight_decay": 5e-4,
        "segmenter.learning.batch": 4,
        "segmenter.loss.kind": "ce",
        "segmenter.loss.gamma": 2.0,
        "segmenter.loss.alpha": 0.5,
        "scaling.mean": IMAGENET,
        "labelled.share": 0.3,
    },
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_papers_numbers_are_in_its_configuration(name):
    more = ["chips.source=cat/catalog.json#chips"] if name == "gpc" else []
    config = load(pipeline_of(name).Config, str(CONFIGS / name / "paper.yaml"), more)
    found = {key: reduce(getattr, key.split("."), config) for key in NUMBERS[name]}
    assert found == NUMBERS[name]


def test_what_no_key_changes_is_as_published():
    agri = load(pipeline_of("agri").Config, str(CONFIGS / "agri" / "paper.yaml"))
    assert [(one.white, one.edges) for one in agri.rounds.rounds] == [
        (None, False),
        (0.5, False),
        (0.9, True),
        (0.9, True),
    ]
    al = load(pipeline_of("al-s4gan").Config, str(CONFIGS / "al-s4gan" / "paper.yaml"))
    assert len(al.classes.table.classes) == 18
    deepglobe = load(pipeline_of("al-s4gan").Config, None, ["classes=deepglobe6"]).classes.table
    assert [deepglobe.names, deepglobe.ignore] == [
        ("urban", "agriculture", "rangeland", "forest", "water", "barren"),
        ((0, 0, 0),),
    ]
    assert RATES_V2 == (6, 12, 18, 24)
    assert (RATES, MULTI_GRID) == ((6, 12, 18), (1, 2, 4))
    assert [(name, recipe.classes, recipe.votes) for name, recipe in RECIPES.items()] == [
        ("v1", 32, True),
        ("v2", 100, False),
        ("deepnet", 32, True),
    ]
    # the key that brings the published code's habit back, not the paper's
    assert SegmenterConfig().scratch.restart
