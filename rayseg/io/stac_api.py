"""Catalogues behind a STAC API: searches that come to an end."""

import re
from typing import Any

import pystac

from rayseg.errors import ConfigError, DataError
from rayseg.store import public

_SIGNS = {"<=": "lte", ">=": "gte", "<": "lt", ">": "gt", "!=": "neq", "=": "eq"}
_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|!=|<|>|=)([^<>=!]+)")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
BUSY = (429, 500, 502, 503, 504)
MOST_ITEMS = 500_000
MOST_STALE = 3
"""Pages in succession without a new item, after which a STAC API is taken to have no end."""


def search(uri: str, question: str | None, geometry: dict[str, Any] | None) -> list[pystac.Item]:
    """The items that a STAC API finds, page by page, each once.

    Args:
        uri: of the API.
        question: `a,b&datetime=2020-01-01/2020-12-31&query=eo:cloud_cover<20`: collections, and of the search's other
            words `datetime`, `query` (several, with commas) and `limit` (items of a page).
        geometry: GeoJSON in EPSG:4326 that they must meet; None for any.

    Raises:
        ConfigError: the question has other words.
        DataError: the API fails, comes to no end, or gives the same page again.
    """
    import pystac_client  # only APIs need it
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO
    from urllib3 import Retry

    names, asked = _asked(question or "")
    stale = 0
    found: dict[tuple[str | None, str], pystac.Item] = {}
    try:
        patient = Retry(5, backoff_factor=0.5, status_forcelist=BUSY, allowed_methods=None)  # a search is a POST
        client = pystac_client.Client.open(uri, stac_io=StacApiIO(max_retries=patient, timeout=60))
        search = client.search(collections=names or None, intersects=geometry, **asked)
        for number, page in enumerate(search.pages_as_dicts(), 1):
            before = len(found)
            for row in page["features"]:
                item = pystac.Item.from_dict(row)
                found.setdefault((item.collection_id, item.id), item)
            stale = stale + 1 if len(found) == before else 0
            if len(found) > MOST_ITEMS or stale == MOST_STALE:
                raise DataError(
                    f"the STAC API {public(uri)} comes to no end: {number} pages with {len(found)} different items, at "
                    f"most {MOST_ITEMS} are taken; ask for a smaller region, or a datetime"
                )
    except (APIError, KeyError, pystac.STACError) as error:
        raise DataError(f"the STAC API {public(uri)} cannot be searched: {public(str(error))[:300]}") from None
    return list(found.values())


def _asked(question: str) -> tuple[list[str], dict[str, Any]]:
    """(collections, other words of the search) of a question to an API."""
    names, *words = question.split("&")
    asked: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in {"datetime", "query", "limit"} or not value or (key == "limit" and not value.isdigit()):
            raise ConfigError(f"{word!r} is no word of a search, expected datetime=..., query=... or limit=...")
        asked[key] = _conditions(value) if key == "query" else int(value) if key == "limit" else value
    return [name for name in names.split(",") if name], asked


def _conditions(text: str) -> dict[str, dict[str, Any]]:
    """`eo:cloud_cover<20,platform=landsat-8` in the words of the query extension; numbers are numbers."""
    found: dict[str, dict[str, Any]] = {}
    for part in text.split(","):
        if not (parts := _CONDITION.fullmatch(part)):
            raise ConfigError(f"query {part!r} is no condition, expected one such as eo:cloud_cover<20")
        name, sign, value = parts.groups()
        number = float(value) if _NUMBER.fullmatch(value) else value
        found.setdefault(name, {})[_SIGNS[sign]] = (
            int(number) if isinstance(number, float) and number % 1 == 0 else number
        )
    return found
