"""Times of imagery: read in any zone, kept and compared in UTC."""

from datetime import UTC, datetime

from pystac.utils import str_to_datetime

UNKNOWN = datetime(1970, 1, 1, tzinfo=UTC)
"""Time of results whose imagery has none; STAC requires one."""


def in_utc(moment: datetime | str) -> datetime:
    """A time, or a text in ISO 8601, in UTC; a time without zone is taken as UTC.

    Raises:
        ValueError: the text is not ISO 8601.
    """
    moment = str_to_datetime(moment.strip()) if isinstance(moment, str) else moment
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def utc_text(moment: datetime | str) -> str:
    """The time as "2020-08-31T00:00:00Z", with six digits of a second if it has a fraction; see `time_order`.

    Raises:
        ValueError: a text is not ISO 8601.
    """
    return f"{in_utc(moment).replace(tzinfo=None).isoformat()}Z"


def time_order(text: str | None) -> str:
    """A key by which texts of `utc_text` sort by time, None first: "Z" itself would sort after a fraction."""
    return (text or "").removesuffix("Z")
