"""The page of the server in a real browser (headless Chromium with WebDriver)."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from advmoe_export import Session, export_model
from PIL import Image
from serving import server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no chromium with its chromedriver", allow_module_level=True)

SCREENSHOTS = os.environ.get("ADVMOE_SCREENSHOTS")
"""A folder; if it is given, the pages are kept there to be looked at."""
LABELS = [f"class {i}" for i in range(10)]
IMAGES = (np.random.default_rng(0).random((32, 3, 1, 1)) * np.ones((32, 3, 16, 16))).astype(np.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, small_moe: Callable[..., Any]) -> Iterator[tuple[Path, str]]:
    path = tmp_path_factory.mktemp("page") / "small.onnx"
    described = {"arch": "vgg16", "kind": "moe", "<b>": "&"}
    export_model(
        small_moe(num_experts=3, model_scale=0.4), path, image_size=16, labels=LABELS, images=IMAGES, metadata=described
    )
    with server(path) as (_, http):
        yield path, str(http.base_url)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def wait(browser: Any, script: str) -> Any:
    """Wait until a script returns something."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda page: page.execute_script(f"return {script}"))


def text(browser: Any, name: str) -> str:
    return str(browser.find_element("id", name).text)


def keep(browser: Any, name: str) -> None:
    if SCREENSHOTS:
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(SCREENSHOTS, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("desktop", 1200, "light"), ("dark", 1200, "dark"), ("phone", 390, "light")]
)
def test_a_dropped_image_gets_label_probabilities_and_its_path(
    name: str, width: int, scheme: str, browser: Any, served: tuple[Path, str], photo: Path
) -> None:
    model, url = served
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)
    wait(browser, "model && model.layers.length")
    assert text(browser, "model") == "small"
    assert len(browser.find_elements("css selector", "#pathway circle")) == 4 * 3
    assert not browser.find_elements("css selector", "#pathway .route")

    browser.find_element("id", "file").send_keys(str(photo))
    wait(browser, "document.querySelector('#pathway .route')")
    keep(browser, name)
    expected = Session(model).run(photo)
    assert expected.pathway is not None
    path = expected.pathway[0].tolist()
    assert text(browser, "label") == expected.labels[0]
    shown = browser.find_elements("css selector", "#bars .value")
    best = np.sort(expected.probabilities[0])[::-1][:5]
    assert [element.text for element in shown] == [f"{100 * share:.1f} %" for share in best]
    assert f"layer by layer: {' '.join(map(str, path))}." in text(browser, "pathway-text")

    # The path runs through the chosen experts: each point of it is the center of a filled circle.
    points = browser.find_element("css selector", "#pathway .route").get_attribute("points").split()
    taken = browser.find_elements("css selector", "#pathway circle.taken")
    assert points == [f"{c.get_attribute('cx')},{c.get_attribute('cy')}" for c in taken]
    titles = [c.find_element("tag name", "title").get_attribute("textContent") for c in taken]
    layers = Session(model).metadata.layers
    assert [t.split(",")[:2] for t in titles] == [[n, f" expert {e}"] for n, e in zip(layers, path, strict=True)]
    # Layers go from left to right, on a phone from top to bottom; nothing is wider than the screen.
    places = [float(point.split(",")[width < 700]) for point in points]
    assert places == sorted(places)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 128) == (scheme == "dark")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_shift_of_the_load_is_shown(browser: Any, served: tuple[Path, str]) -> None:
    _, url = served
    image = np.repeat(IMAGES[:1], 40, axis=0)
    tensor = {"name": "images", "shape": list(image.shape), "datatype": "FP32", "data": image.reshape(-1).tolist()}
    httpx.post(f"{url}/v2/models/small/infer", json={"inputs": [tensor]}, trust_env=False).raise_for_status()
    browser.get(url)
    wait(browser, "model && model.images >= 40")
    assert "more load has moved than chance explains" in text(browser, "load-text")
    assert browser.find_elements("css selector", "#load .now")
    assert browser.find_elements("css selector", "#load .bad")
    keep(browser, "shifted")


def test_what_is_no_image_is_said_on_the_page(browser: Any, served: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    browser.get(served[1])
    browser.find_element("id", "file").send_keys(str(tmp_path / "notes.txt"))
    wait(browser, "!document.getElementById('error').hidden")
    assert "cannot be decoded as an image" in text(browser, "error")
    assert not browser.find_element("id", "result").is_displayed()
