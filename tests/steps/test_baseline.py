import numpy as np
import pytest
from test_report import fake, later, page_of

from rayseg.config import Config, added, complete
from rayseg.metrics import Confusion
from rayseg.steps.baseline import Method, comparison, parts_of, value_of
from rayseg.steps.report import Extras, headline

METHODS = (Method("a linear head", 0.53, 31.4, {"road": 0.4}), Method("a random forest", 0.47, 60))
VALUE = value_of("mean IoU", "the validation scenes tile5, tile6", METHODS)


def test_a_model_behind_its_best_baseline_says_so_and_one_ahead_does_not():
    assert comparison(VALUE, 0.5).first == "This model is behind its baseline: mean IoU 0.500, a linear head 0.530."
    assert comparison(VALUE, 0.53).first == ""
    assert comparison(value_of("mean IoU", "here", ()), 0.1).first == ""


def test_the_table_has_the_product_first_and_a_dash_for_what_is_not_measured():
    title, header, rows = comparison(VALUE, 0.5, parts={"road": 0.3, "water": 0.7}).table
    assert title == "Next to simple baselines, on the validation scenes tile5, tile6"
    assert header == ("method", "mean IoU", "road", "water", "processor time")
    assert rows == [
        ("this model", "0.500", "0.300", "0.700", "–"),
        ("a linear head", "0.530", "0.400", "–", "31 s"),
        ("a random forest", "0.470", "–", "–", "60 s"),
    ]


def test_parts_are_the_classes_that_the_reference_has():
    confusion = Confusion(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
    assert parts_of(confusion, ("a", "b", "c")) == pytest.approx({"a": 0.75, "b": 0.8})


@pytest.mark.parametrize(("product", "behind"), [(0.5, True), (0.6, False)])
def test_the_report_begins_with_the_baseline_that_is_ahead(tmp_path, product, behind):
    predicted, _ = fake(tmp_path)
    value, page = page_of(predicted, extras=Extras(baseline=comparison(VALUE, product)))
    first = "This model is behind its baseline: mean IoU 0.500, a linear head 0.530."
    assert value["summary"].startswith(first) == behind
    assert (first in headline(later(predicted, "report", value))) == behind
    assert "Next to simple baselines, on the validation scenes tile5, tile6" in page.text


class Old(Config):
    kept: int = 1


class New(Old):
    baseline: bool = added(default=True)
    """Whether to measure baselines."""


def test_an_added_setting_changes_no_json_until_it_is_used():
    assert New().model_dump(mode="json") == Old().model_dump(mode="json")
    assert New(baseline=False).model_dump(mode="json") == {"kept": 1, "baseline": False}
    assert New.model_validate({"baseline": False}) != New()
    assert "baseline" in New.model_json_schema()["properties"]


class Outer(Config):
    inner: New = New()
    cut: tuple[int, int] = (1, 2)


def test_a_shown_configuration_has_the_added_settings_too():
    assert complete(Outer()) == {"inner": {"kept": 1, "baseline": True}, "cut": [1, 2]}
