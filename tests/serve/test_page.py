"""The pages in a real browser: an image dropped, its mask, classes under the pointer, downloads, keys, a run's map."""

import io
import shutil

import numpy as np
import pytest
from fake_run import blobs, make, picture
from PIL import ExifTags, Image
from small_world import segmenter
from tiny_server import encoded, image_HWC, listening, sam_picture, served, untrained_sam

from rayseg.io.maps import mapped_tiles

CHROMIUM = shutil.which("chromium")
TOKEN = "a-token-of-more-than-16-characters"
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server with a model, a run with a failed tile, and a token."""
    root = tmp_path_factory.mktemp("world")
    segmenter(root / "cover")
    mask = blobs(128, 192)
    (root / "runs").mkdir()
    scene = {"scene": (picture(mask), mask, (0, 0))}
    make(root / "whole/map", scene)
    [*_, last] = mapped_tiles(root / "whole/map")
    make(root / "runs/map", scene, fates={last.tile.id: ("failed", "its file is damaged")})
    (root / "token").write_text(TOKEN)
    with untrained_sam(root / "sam") as sam:
        app = served(root / "cover", sam, runs=(str(root / "runs"),), token_file=str(root / "token"))
        with listening(app) as address:
            yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """A page with the token; its script errors fail the test."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    context.add_init_script(f"sessionStorage.setItem('rayseg-token', '{TOKEN}')")
    opened, errors = context.new_page(), []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None)
    yield opened
    context.close()
    assert errors == []


@pytest.fixture
def mapped(page, address):
    """The page with an image that was mapped."""
    page.goto(address)
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.set_input_files("#file", {"name": "field.png", "mimeType": "image/png", "buffer": encoded(image_HWC())})
    page.wait_for_selector("#shown:not([hidden])")
    page.click("#go")
    page.wait_for_selector("#result:not([hidden])")
    return page


def test_an_image_is_mapped_and_its_classes_are_listed(mapped):
    assert "gpc" in mapped.inner_text("#legend")
    assert "%" in mapped.inner_text("#legend")
    mapped.hover("#view", position={"x": 60, "y": 40})
    assert mapped.inner_text("#readout").split(" at ")[0] in {"gpc", "background"}
    assert mapped.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_mask_is_seen_through_as_the_slider_says(mapped):
    mapped.fill("#opacity", "25")
    assert mapped.evaluate("document.getElementById('mask').style.opacity") == "0.25"
    assert mapped.inner_text("#percent") == "25 %"


def test_the_keyboard_alone_reads_classes_and_moves_the_slider(mapped):
    mapped.focus("#view")
    mapped.keyboard.press("ArrowRight")
    assert "at column 66, row 45" in mapped.inner_text("#readout")
    mapped.focus("#opacity")
    mapped.keyboard.press("ArrowLeft")
    assert mapped.inner_text("#percent") == "59 %"


@pytest.mark.parametrize(("button", "start"), [("PNG", b"\x89PNG"), ("GeoTIFF", b"II*\0"), ("GeoJSON", b'{"type"')])
def test_results_are_downloaded(mapped, tmp_path, button, start):
    with mapped.expect_download() as download:
        mapped.click(f"text=Download {button}")
    path = tmp_path / "file"
    download.value.save_as(path)
    assert path.read_bytes().startswith(start)
    assert download.value.suggested_filename.startswith("field-")


@pytest.mark.parametrize(("orientation", "size", "red_at"), [(3, (120, 60), (0.8, 0.5)), (6, (60, 120), (0.5, 0.2))])
def test_an_image_is_shown_and_mapped_in_its_exif_orientation(page, address, orientation, size, red_at):
    """So the mask, the readout and the clicks lie on it; the server turns its pixels, too."""
    picture_HWC = np.zeros((60, 120, 3), np.uint8)
    picture_HWC[:, :60], picture_HWC[:, 60:] = (220, 30, 30), (30, 30, 220)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(picture_HWC, "JPEG", quality=95, exif=exif)
    page.goto(address)
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.set_input_files("#file", {"name": "turned.jpg", "mimeType": "image/jpeg", "buffer": data})
    page.wait_for_selector("#shown:not([hidden])")
    assert page.evaluate("[mask.width, mask.height]") == list(size)
    page.click("#go")
    page.wait_for_selector("#result:not([hidden])")
    page.fill("#opacity", "0")
    box = page.locator("#view").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(size[0] / size[1], rel=0.02)
    at = {"x": box["width"] * 48.5 / size[0], "y": box["height"] * 6.5 / size[1]}
    page.hover("#view", position=at)
    assert "at column 48, row 6" in page.inner_text("#readout")
    shown_HWC = np.asarray(Image.open(io.BytesIO(page.locator("#view").screenshot())).convert("RGB"), int)
    height, width = shown_HWC.shape[:2]
    x, y = red_at
    red, blue = shown_HWC[int(height * y), int(width * x)], shown_HWC[int(height * (1 - y)), int(width * (1 - x))]
    assert red[0] > 180 > 80 > red[2]
    assert blue[2] > 180 > 80 > blue[0]


def test_one_prediction_gives_what_is_shown_and_downloaded(page, address):
    sent = []
    page.on("request", lambda one: sent.append(one.url) if one.method == "POST" else None)
    page.set_viewport_size({"width": 1366, "height": 768})
    page.goto(address)
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.set_input_files("#file", {"name": "field.png", "mimeType": "image/png", "buffer": encoded(image_HWC())})
    page.wait_for_selector("#shown:not([hidden])")
    page.click("#go")
    page.wait_for_selector("#result:not([hidden])")
    for button in ("PNG", "GeoTIFF", "GeoJSON"):
        box = page.locator(f"text=Download {button}").bounding_box()
        assert box["y"] + box["height"] <= 768  # without scrolling
        with page.expect_download():
            page.click(f"text=Download {button}")
    assert len(sent) == 1
    assert "130 × 90 px, without georeference" in page.inner_text("#facts")


def test_the_mask_is_outlined_wiped_and_its_classes_hidden(mapped):
    pixels = "mask.getContext('2d').getImageData(0, 0, mask.width, mask.height).data"
    painted = f"{pixels}.filter((value, at) => at % 4 == 3 && value).length"
    whole = mapped.evaluate(painted)
    mapped.check("input[value=outline]")
    assert 0 < mapped.evaluate(painted) < whole
    mapped.check("input[value=fill]")
    assert mapped.evaluate(painted) == whole
    mapped.uncheck("[aria-label='show gpc']")
    assert mapped.evaluate(painted) == 0
    mapped.check("[aria-label='show gpc']")
    mapped.check("input[value=swipe]")
    mapped.fill("#swipe", "30")
    assert "70%" in mapped.evaluate("mask.style.clipPath")


def test_the_image_is_zoomed_and_moved_and_still_read_where_the_pointer_is(mapped):
    mapped.hover("#view", position={"x": 60, "y": 40})
    before = mapped.inner_text("#readout")
    mapped.mouse.wheel(0, -600)
    assert "scale(4)" in mapped.evaluate("stage.style.transform")
    mapped.hover("#view", position={"x": 60, "y": 40})
    assert mapped.inner_text("#readout") == before  # the place under the pointer stays
    mapped.hover("#view", position={"x": 64, "y": 40})
    box = mapped.locator("#view").bounding_box()
    mapped.mouse.down()
    mapped.mouse.move(box["x"] + 24, box["y"] + 40, steps=4)
    mapped.mouse.up()
    mapped.hover("#view", position={"x": 60, "y": 40})
    assert mapped.inner_text("#readout") != before
    mapped.click("#fit")
    assert mapped.evaluate("stage.style.transform") == ""


def test_a_prediction_is_cancelled(page, address):
    page.goto(address)
    playwright.expect(page.locator("#model option")).to_have_count(4)
    page.route("**/predict", lambda route: None)  # never answered
    page.set_input_files("#file", {"name": "field.png", "mimeType": "image/png", "buffer": encoded(image_HWC())})
    page.wait_for_selector("#shown:not([hidden])")
    page.click("#go")
    playwright.expect(page.locator("#readout")).to_contain_text("Predicting")
    page.click("#cancel")
    assert page.inner_text("#readout") == "Cancelled."
    assert page.is_enabled("#go")
    assert page.inner_text("#error") == ""


def test_errors_are_shown_as_sentences(mapped):
    mapped.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    playwright.expect(mapped.locator("#error")).to_contain_text("send a PNG")
    assert "notes.txt" not in mapped.inner_text("#chosen")


def test_without_the_token_the_page_asks_for_it(browser, address):
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(address)
    opened.wait_for_selector("#token-row:not([hidden])")
    opened.fill("#token", TOKEN)
    opened.keyboard.press("Tab")
    playwright.expect(opened.locator("#model option")).to_have_count(4)
    context.close()


def test_a_run_is_shown_on_a_map_that_can_be_moved(page, address):
    page.goto(f"{address}/runs/map")
    playwright.expect(page.locator("#map img.leaflet-tile-loaded[src^=blob]").first).to_be_visible(timeout=20_000)
    assert "gpc" in page.inner_text("#legend")
    assert "1 failed" in page.inner_text("#ledger")
    assert "its file is damaged" in page.inner_text("#troubles")
    assert page.locator("#map path.leaflet-interactive").count() == 1
    before = page.get_attribute(".leaflet-map-pane", "style")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator(".leaflet-map-pane")).not_to_have_attribute("style", before)


def test_layers_are_switched_and_the_value_under_the_pointer_is_shown(page, address):
    page.set_viewport_size({"width": 1200, "height": 700})
    page.goto(f"{address}/runs/map")
    tiles = page.locator("#map img.leaflet-tile-loaded[src^=blob]")
    playwright.expect(tiles.first).to_be_visible(timeout=20_000)
    playwright.expect(page.locator("#loading")).to_be_hidden(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollHeight") == 700  # the map fills the window
    page.hover("#map", position={"x": 400, "y": 300})
    playwright.expect(page.locator("#value")).to_contain_text("|", timeout=20_000)
    assert page.inner_text("#value").split(" | ")[0] in {"gpc", "background", "not mapped"}
    for name in ("imagery", "classes", "failed"):
        page.uncheck(f"#show-{name}")
    assert tiles.count() == 0
    assert page.locator("#map path.leaflet-interactive").count() == 0


def test_tiles_that_a_busy_server_refused_are_asked_for_again(page, address):
    refused = set()

    def once_busy(route):
        if route.request.url in refused:
            return route.continue_()
        refused.add(route.request.url)
        return route.fulfill(status=503, headers={"Retry-After": "1"}, json={"detail": "busy"})

    page.route("**/tiles/**", once_busy)
    page.goto(f"{address}/runs/map")
    playwright.expect(page.locator("#map img.leaflet-tile-loaded[src^=blob]").first).to_be_visible(timeout=20_000)
    assert refused


def test_things_are_clicked_on_and_points_taken_back(page, address):
    page.goto(address)
    page.select_option("#model", label="sam-vit-b: segment at points")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": encoded(sam_picture())})
    page.wait_for_selector("#shown:not([hidden])")
    assert page.is_disabled("#go")
    page.click("#view", position={"x": 40, "y": 30})
    playwright.expect(page.locator("#legend")).to_contain_text("1 object")
    page.click("#view", position={"x": 90, "y": 60}, modifiers=["Shift"])
    playwright.expect(page.locator("#points")).to_have_text("2 points")
    page.focus("#view")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#points")).to_have_text("3 points")
    page.keyboard.press("Backspace")
    playwright.expect(page.locator("#points")).to_have_text("2 points")
    playwright.expect(page.locator("#readout")).to_contain_text("Done")
    assert page.locator('[data-media="image/tiff"]').is_hidden()
    page.click("#clear")
    assert page.is_disabled("#go")
    assert page.locator("#result").is_hidden()
    page.select_option("#model", label="sam-vit-b: segment everything")
    page.click("#go")
    playwright.expect(page.locator("#legend")).to_contain_text("object")
