"""Catalogues that are one table: STAC items in Parquet, of which those far from a region are never made into items."""

import io
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayseg.errors import ConfigError, DataError
from rayseg.store import upath

Box = tuple[float, float, float, float]
"""(west, south, east, north) in degrees."""


def items_of(uri: str, box: Box | None) -> list[dict[str, Any]]:
    """The items of an `items.parquet` as STAC JSON values; of those that miss the box none, if one is given.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no table of items.
    """
    from stac_geoparquet.arrow import stac_table_to_items  # takes time to import, and few catalogues are tables

    try:
        table = pq.read_table(io.BytesIO(upath(uri).read_bytes()))
        return list(stac_table_to_items(table if box is None else table.filter(_meeting(table, box))))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"Catalogue {uri} is not there.") from error
    except (pa.ArrowException, KeyError) as error:
        raise DataError(f"{uri} is not a table of STAC items: {error}.") from error


def _meeting(table: pa.Table, box: Box) -> pa.ChunkedArray:
    """Which rows of a table of items meet a box; those that do not say, or cross the antimeridian, do."""
    if "bbox" not in table.column_names or not pa.types.is_struct(table.schema.field("bbox").type):
        return pa.chunked_array([np.ones(len(table), bool)])
    west, south, east, north = (pc.struct_field(table["bbox"], name) for name in ("xmin", "ymin", "xmax", "ymax"))
    apart = (pc.greater(west, box[2]), pc.less(east, box[0]), pc.greater(south, box[3]), pc.less(north, box[1]))
    missing = pc.and_(reduce(pc.or_, apart), pc.less_equal(west, east))
    return pc.invert(pc.fill_null(missing, False))
