"""Lists of names as the published codes keep them."""

import numpy as np
import pytest

from rayseg.config import Config, load
from rayseg.errors import ConfigError
from rayseg.io.name_lists import Names, write_names


class Asked(Config):
    names: Names = ()


def read(path):
    return load(Asked, None, [f"names={path}"]).names


def test_names_are_read_from_text_csv_and_arrays_without_folders_and_suffixes(tmp_path):
    (tmp_path / "a.txt").write_text("airplane/airplane01.tif masks/airplane01.png\n\nbeach02\n")
    (tmp_path / "b.csv").write_text("rank,id\n1,airplane01.tif\n2,beach02\n")
    np.save(tmp_path / "c.npy", np.array(["airplane01.tif", "beach02"]))
    for name in ("a.txt", "b.csv", "c.npy"):
        assert read(tmp_path / name) == ("airplane01", "beach02")
    assert read("[x, y]") == ("x", "y")


def test_what_is_written_is_read_again(tmp_path):
    write_names(tmp_path, "chosen", ["east-a_0_1", "b"])
    for suffix in ("txt", "csv", "npy"):
        assert read(tmp_path / f"chosen.{suffix}") == ("east-a_0_1", "b")


def test_arrays_of_objects_and_missing_files_are_refused_with_the_way_out(tmp_path):
    np.save(tmp_path / "o.npy", np.array(["a", None], object))
    for path in (tmp_path / "o.npy", tmp_path / "none.txt"):
        with pytest.raises(ConfigError, match=r"config key names: .* is not a list of names .*np.save"):
            read(path)


@pytest.mark.parametrize(("names", "number"), [("[012, x]", 10), ("7", 7)])
def test_numbers_are_refused_because_yaml_changes_them(names, number):
    with pytest.raises(ConfigError, match=f"names: {number} is a number, expected a name; put names into quotes"):
        read(names)
    assert read("['012']") == ("012",)
