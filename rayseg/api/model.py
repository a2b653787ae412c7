"""A trained model: predict arrays, lazy arrays and image files in this process, with the pixels of `rayseg predict`."""

import html
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayseg.errors import DataError, RunIncomplete
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.rasters import is_number
from rayseg.io.sources import Source, crs_text
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.stages.predict import Predict, lattice_of
from rayseg.stages.rows import TileRow
from rayseg.store import StorePath, absolute

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray


_NUMBERED = re.compile(r"(b|band)?[ _-]?\d+", re.IGNORECASE)


class Prediction(NamedTuple):
    """The map of one image.

    Attributes:
        classes: (height, width) uint8, 255 where there is no imagery.
        scores: (bands, height, width) uint8: probability x 254, 255 where there is no imagery.
    """

    classes: Any
    scores: Any


class Model:
    """A trained model (bundle) in a folder or at a URL; its weights are read with the first prediction.

    Args:
        prefix: of the bundle, for example runs/demo/models/segmenter.

    Raises:
        ModelError: there is no whole bundle.

    Example:
        >>> model = rayseg.load_model("runs/demo/models/segmenter")  # doctest: +SKIP
        >>> classes, scores = model.predict("image.tif")  # doctest: +SKIP
    """

    def __init__(self, prefix: StorePath) -> None:
        self.prefix = absolute(str(prefix)).rstrip("/")
        self.bundle: Bundle = bundle.description(self.prefix)

    @cached_property
    def _stage(self) -> Predict:
        return Predict(self.prefix)

    def predict(self, image: "str | Path | NDArray[Any] | xr.DataArray") -> Prediction:
        """Classes and scores of an image.

        Args:
            image: a file or URL; or an array (bands, height, width) with the model's bands in their order, in stored
                values: NaN, infinity, what a masked array masks, and the nodata of a DataArray (`.rio.nodata`) are
                missing data. A DataArray with CRS and transform is predicted on its own grid; bands with names
                (coordinate `band`, or attribute `long_name`) may have any order.

        Returns:
            DataArrays with CRS and transform for a file and a DataArray, arrays for an array.

        Raises:
            DataError: the file cannot be read, or the array is not of this shape.
            ModelError: bands or data type are not those of the model.
        """
        if isinstance(image, str | Path):
            return self._file(str(image))
        if isinstance(image, np.ndarray):
            known_CHW = is_number(np.ma.getdata(image)) & ~np.ma.getmaskarray(image)
            return self._array(np.ma.getdata(image), known_CHW, None, None)
        return self._data_array(image)

    def _file(self, image: str) -> Prediction:
        """By the pipeline of `rayseg predict`, so that bands, units and orientation are read as there."""
        from rayseg.api.results import Run
        from rayseg.api.running import run

        with tempfile.TemporaryDirectory() as folder:
            try:
                run(
                    "predict",
                    image,
                    set={"model": self.prefix, "certificate": False},
                    out=f"{folder}/run",
                    engine="inline",
                )
            except RunIncomplete as error:
                reason = str(error).partition("; fix the cause")[0]
                raise DataError(f"{image} cannot be predicted as a whole: {reason}; correct the file") from None
            done = Run(f"{folder}/run")
            return Prediction(done.classes.load(), done.scores.load())

    def _data_array(self, image: "xr.DataArray") -> Prediction:
        import rioxarray  # noqa: F401 - registers `.rio`
        import xarray as xr

        if not isinstance(image, xr.DataArray):
            raise DataError(
                f"the image is a {type(image).__name__}, expected a file, an array or a DataArray; give one"
            )
        image = self._in_order(image)
        pixels = np.asarray(image.transpose("band", ...).values)
        valid_CHW = is_number(pixels)
        if image.rio.nodata is not None and np.isfinite(image.rio.nodata):
            known_CHW = pixels != image.rio.nodata
            # As in a file: 255 of a band is a brightness, too.
            valid_CHW &= known_CHW.any(axis=0) if pixels.dtype == np.uint8 else known_CHW
        affine = image.rio.transform(recalc=True)  # what is stored is that of the array before it was cut
        transform = tuple(affine)[:6]
        crs = crs_text(image.rio.crs) if image.rio.crs else None
        unit = (float(image.attrs.get("scale_factor", 1.0)), float(image.attrs.get("add_offset", 0.0)))
        prediction = self._array(pixels, valid_CHW, crs, transform, unit)
        place = {name: image[name] for name in ("y", "x") if name in image.coords}

        def like(values: np.ndarray, name: str) -> xr.DataArray:
            dims = ("band", "y", "x")[3 - values.ndim :]
            array = xr.DataArray(values, place, dims, name=name).rio.write_transform(affine)
            placed: xr.DataArray = array.rio.write_nodata(255)
            return placed.rio.write_crs(image.rio.crs) if image.rio.crs else placed

        return Prediction(like(prediction.classes, "classes"), like(prediction.scores, "scores"))

    def _in_order(self, image: "xr.DataArray") -> "xr.DataArray":
        """The image with the model's bands in their order, by name if its bands have names.

        Raises:
            DataError: it has not the dimensions band, y and x, its coordinates are not evenly spaced, or it has names
                and lacks a band.
        """
        if sorted(map(str, image.dims)) != ["band", "x", "y"]:
            raise DataError(
                f"the image has the dimensions {', '.join(map(str, image.dims))}, expected band, y and x; rename them"
            )
        for name in ("y", "x"):
            steps = np.diff(np.asarray(image[name], np.float64)) if name in image.coords else np.zeros(0)
            if len(steps) and not np.allclose(steps, steps.mean(), rtol=1e-3, atol=0):
                raise DataError(
                    f"the coordinates {name} of the image are not evenly spaced (steps of {steps.min():g} to "
                    f"{steps.max():g}), so its pixels have no one place; resample it to a regular grid"
                )
        wanted, given = list(self.bundle.bands), image.coords.get("band")
        texts = image.attrs.get("long_name", ()) if given is None or given.dtype.kind not in "UO" else given.values
        names = [str(name) for name in np.atleast_1d(texts)]
        if len(names) != image.sizes["band"] or all(map(_NUMBERED.fullmatch, names)):
            return image  # numbered: taken as the model's, in its order
        if missing := [name for name in wanted if name not in names]:
            raise DataError(
                f"the image has the bands {', '.join(names)} and lacks {', '.join(missing)}, which model "
                f"{self.bundle.name} expects; add them, or rename them"
            )
        ordered: xr.DataArray = image.isel(band=[names.index(name) for name in wanted])
        return ordered

    def _array(
        self,
        image: "NDArray[Any]",
        valid_CHW: "NDArray[np.bool_] | np.bool_",
        crs: str | None,
        transform: tuple[float, ...] | None,
        unit: tuple[float, float] | None = None,
    ) -> Prediction:
        described = self.bundle
        if image.ndim != 3 or len(image) != len(described.bands):
            raise DataError(
                f"the image has the shape {image.shape}, model {described.name} expects (bands, height, width) with "
                f"the bands {', '.join(described.bands)}; transpose or select its bands"
            )
        units = (unit,) * len(described.bands) if unit else ()
        described.check_contract(described.bands, str(image.dtype), units=units, source="the image")
        if crs and transform and not (transform[0] > 0 > transform[4] and transform[1] == transform[3] == 0):
            raise DataError("the image is rotated or flipped; write it to a file, or reproject it to a north-up grid")
        # 1. its place on a grid decides where patches lie, as for a file
        height, width = image.shape[1:]
        source = Source("image", (), crs, transform or (1, 0, 0, 0, 1, 0), height, width, str(image.dtype))
        grid: Grid = grids_of([source])[0][0]
        window = footprint(source, grid) if crs else Window(0, 0, width, height)
        # 2. the image on the window that its patches reach
        tile = Tile("image", grid, window)
        reach = lattice_of(described, tile).reach(window)
        rows, cols = window.slices(reach)
        pixels = np.zeros((len(image), reach.height, reach.width), image.dtype)
        inside = np.zeros((reach.height, reach.width), bool)
        # As a file is read: a pixel is valid where any band is.
        pixels[:, rows, cols], inside[rows, cols] = np.where(valid_CHW, image, 0), np.any(valid_CHW, axis=0)
        (row,) = self._stage([TileRow(tile, "[]", image=pixels, valid=inside, reach=reach)])
        return Prediction(row.classes, row.scores)

    def __repr__(self) -> str:
        return f"Model({self.prefix!r}: {self.bundle.task}, {', '.join(name for _, name, _ in self.bundle.classes)})"

    def _repr_html_(self) -> str:
        described = self.bundle
        rows = {
            "task": described.task,
            "classes": ", ".join(name for _, name, _ in described.classes),
            "bands": f"{', '.join(described.bands)} ({described.dtype})",
            "metrics": ", ".join(f"{name} {value:.3f}" for name, value in described.metrics.items()),
        }
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table><caption>{html.escape(self.prefix)}</caption>{cells}</table>"
