"""Images made larger: as the whole image would be, whatever is enlarged at once, and files refused clearly."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact

from rayseg.errors import ModelError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.models.super_resolution import EnlargeConfig, load_enlarger
from rayseg.stages.enlarge import EnlargeTiles
from rayseg.stages.rows import TileRow

torch.set_num_threads(1)


def picture(seed=0, shape=(50, 70)):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (5, 7, 3)).repeat(10, axis=0).repeat(10, axis=1)[: shape[0], : shape[1]]
    return np.clip(blocks + rng.normal(0, 9, (*shape, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def network(tmp_path):
    """A file of a small network of the kind of Real-ESRGAN's, that has learnt nothing."""
    torch.manual_seed(0)
    model = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4)
    torch.save({"params_ema": model.state_dict()}, tmp_path / "network.pth")
    return str(tmp_path / "network.pth")


def tile(image, window, config):
    """What the stage makes of `window` of an image that ends where the array does."""
    stage, (height, width) = EnlargeTiles(config), image.shape[:2]
    cells = stage.lattice.cells(window)
    reach = stage.lattice.around(cells[0]).union(stage.lattice.around(cells[-1]))
    pixels, valid = np.zeros((reach.height, reach.width, 3), np.uint8), np.zeros((reach.height, reach.width), bool)
    whole = Window(0, 0, width, height)
    part = whole.intersect(reach)
    pixels[part.slices(reach)], valid[part.slices(reach)] = image[part.slices(whole)], True
    tile = Tile("a", Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0)), window)
    [found] = stage([TileRow(tile, "[]", image=pixels, valid=valid, reach=reach)])
    assert found.reach == Window(4 * window.col, 4 * window.row, 4 * window.width, 4 * window.height)
    return found.image, found.valid


@pytest.mark.parametrize("by", ["network", "interpolation"])
def test_pixels_are_the_same_however_the_imagery_is_cut(network, by):
    image = picture()
    config = EnlargeConfig(weights=network if by == "network" else None, stride=16, margin=12)
    whole, valid = tile(image, Window(0, 0, 70, 50), config)
    assert whole.shape == (200, 280, 3)
    assert valid.all()
    for window in (Window(0, 0, 30, 50), Window(30, 10, 21, 9), Window(64, 48, 6, 2)):
        part, _ = tile(image, window, config)
        rows, cols = slice(4 * window.row, 4 * window.row1), slice(4 * window.col, 4 * window.col1)
        assert np.array_equal(part, whole[rows, cols])


def test_the_middle_is_as_if_the_image_were_enlarged_whole(network):
    image = picture()
    found, _ = tile(image, Window(0, 0, 70, 50), EnlargeConfig(stride=16, margin=12))
    expected = cv2.resize(image, (280, 200), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(found[12:-12, 12:-12], expected[12:-12, 12:-12])
    config = EnlargeConfig(weights=network, stride=16, margin=12)
    found, _ = tile(image, Window(0, 0, 70, 50), config)
    whole = load_enlarger(config, device="cpu")(image)
    assert np.abs(found[40:-40, 40:-40].astype(int) - whole[40:-40, 40:-40]).max() <= 1


@pytest.mark.parametrize("wrap", ["generator.", "module.net_g.", "model."])
def test_a_network_is_found_within_what_it_was_trained_in(network, tmp_path, wrap):
    state = torch.load(network, weights_only=True)
    inside = {wrap + key: tensor for key, tensor in state.get("params", state).items()}
    torch.save({"state_dict": inside | {"discriminator.0.weight": torch.zeros(2)}}, tmp_path / "gan.ckpt")
    image = picture()
    found = load_enlarger(EnlargeConfig(weights=str(tmp_path / "gan.ckpt")), device="cpu")(image)
    assert np.array_equal(found, load_enlarger(EnlargeConfig(weights=network), device="cpu")(image))


def test_files_that_are_no_such_network_are_refused(network, tmp_path):
    with pytest.raises(ModelError, match="to 3 channels with factor 4, expected from 3 to 3 with factor 2"):
        load_enlarger(EnlargeConfig(weights=network, factor=2))
    with pytest.raises(ModelError, match=r"none\.pth cannot be read"):
        load_enlarger(EnlargeConfig(weights=str(tmp_path / "none.pth")))
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"other\.pth contains no network that spandrel supports"):
        load_enlarger(EnlargeConfig(weights=str(tmp_path / "other.pth")))
    path = tmp_path / "network.pth"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelError, match=r"network\.pth \(3000 bytes\) are damaged"):
        load_enlarger(EnlargeConfig(weights=str(path)))


@pytest.mark.real
def test_real_esrgan_gives_a_sharper_image_of_the_same_scene(shared):
    weights = str(shared / "weights/realesr-general-x4v3_from_ncnn_fp16.pth")
    whole = np.array(Image.open(shared / "data/agri/0018.jpg"))[300:556, 200:456]
    small = cv2.resize(whole, (64, 64), interpolation=cv2.INTER_AREA)
    found = load_enlarger(EnlargeConfig(weights=weights), device="cpu")(small)
    assert found.shape == whole.shape
    plain = load_enlarger(EnlargeConfig())(small)
    error, of_plain = (np.abs(one.astype(int) - whole).mean() for one in (found, plain))
    assert error < 1.3 * of_plain
    edges = [np.abs(np.diff(one.astype(int), axis=1)).mean() for one in (found, plain)]
    assert edges[0] > edges[1]  # sharper
