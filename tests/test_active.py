import pytest

from rayseg.active import ActiveConfig
from rayseg.config import load
from rayseg.errors import ConfigError


def test_networks_that_give_no_features_are_refused():
    with pytest.raises(ConfigError, match=r"classifier.network = 'plots': input should be 'chips' or 'over-imagenet'"):
        load(ActiveConfig, None, ["classifier.network=plots"])
