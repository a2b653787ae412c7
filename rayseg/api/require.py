"""Requirements on a finished run: `--require 'certificate.shift<0.03'` for gates of other programs."""

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayseg.errors import ConfigError, RequirementNotMet, listed

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_FORM = re.compile(r"\s*(certificate|metrics)\.(.+?)\s*(<=|>=|<|>)\s*([^<>=]+?)\s*")
_CERTIFIED = ("gpc", "landcover", "al-s4gan", "predict")


@dataclass(frozen=True)
class Requirement:
    """A limit on a number of a run.

    Attributes:
        text: as it was given.
        file: certificate or metrics: the JSON file of the run that has the number.
        name: of the number, with dots for groups.
        sign: one of <, <=, >, >=.
        limit: the number that it is compared with.
    """

    text: str
    file: str
    name: str
    sign: str
    limit: float


def requirements(texts: Sequence[str], pipeline: str, settings: Any) -> list[Requirement]:  # noqa: ANN401 - a Config
    """Read requirements, before the run begins.

    Args:
        texts: such as `certificate.shift<0.03` or `metrics.iou.gpc>=0.6`.
        pipeline: that will run.
        settings: its configuration.

    Raises:
        ConfigError: a text is not of that form, or the run will have no certificate or no such measure.
    """
    read = []
    for text in texts:
        form = _FORM.fullmatch(text)
        try:
            limit = float(form[4]) if form else float("nan")
        except ValueError:
            limit = float("nan")
        if not form or limit != limit:
            raise ConfigError(
                f"--require {text!r} is not of the form certificate.NAME<NUMBER or metrics.NAME>=NUMBER; correct it"
            )
        if form[1] == "certificate":
            _expect_measured(text, form[2], pipeline, settings)
        read.append(Requirement(text, form[1], form[2], form[3], limit))
    return read


def _expect_measured(text: str, name: str, pipeline: str, settings: Any) -> None:  # noqa: ANN401 - a Config
    from rayseg.steps.certificate import LIMITS

    if pipeline not in _CERTIFIED:
        raise ConfigError(
            f"--require {text!r}: {pipeline} has no certificate, which is for maps by a single model "
            f"({', '.join(_CERTIFIED)}); require a number of metrics.json"
        )
    if not settings.certificate:
        raise ConfigError(f"--require {text!r}, but certificate is false; leave one of them out")
    if name not in LIMITS:
        raise ConfigError(f"--require {text!r}: a certificate has no {name}, expected one of {', '.join(LIMITS)}")


def expect_met(required: Sequence[Requirement], root: str) -> None:
    """Check the numbers of a finished run.

    Raises:
        RequirementNotMet: a number is beyond its limit, or is not known.
    """
    missed = []
    for one in required:
        value = _value_of(one, root)
        if isinstance(value, str):
            missed.append(f"{one.text} cannot be judged: {value}")
        elif not _OPERATORS[one.sign](value, one.limit):
            missed.append(f"{one.file}.{one.name} is {value:.6g}, required {one.sign} {one.limit:g}")
    if missed:
        raise RequirementNotMet(f"{'; '.join(missed)}; the map is finished; see {root}/report/index.html")


def _value_of(one: Requirement, root: str) -> float | str:
    """The number that is required; or why there is none."""
    from rayseg.store import upath

    path = upath(root) / f"{one.file}.json"
    if not path.exists():
        return f"the run has no {one.file}.json"
    content: Any = json.loads(path.read_bytes())
    inner, left = content, one.name
    # Names of classes may have dots, so the longest name that fits is taken first.
    while isinstance(inner, Mapping) and left:
        key = max((key for key in inner if left == key or left.startswith(f"{key}.")), key=len, default=None)
        if key is None:
            return f"{one.file}.json has no {one.name}, but {listed(list(inner), most=20)}"
        inner, left = inner[key], left[len(key) + 1 :]
    if inner is None:
        return str(content.get("unknown", {}).get(one.name, "it is not known"))
    if isinstance(inner, bool) or not isinstance(inner, int | float) or left:
        return f"{one.name} of {one.file}.json is not a number"
    return float(inner)
