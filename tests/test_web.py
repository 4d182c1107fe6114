"""web/index.html in headless Chromium: what is drawn there is answered as Python answers it."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import filelock
import pytest
import torch
from PIL import Image

from datasets.registry import Digits
from deploy.engine_file import ROOT, to_bytes
from deploy.packed import natural_form
from models.replace import load_model

api = pytest.importorskip("playwright.sync_api")
TOOLS = {name: shutil.which(name) for name in ("em++", "chromium")}
pytestmark = pytest.mark.skipif(not all(TOOLS.values()), reason="no emscripten or no Chromium")
CLASSES = [f"digit {i}" for i in range(10)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a path that begins with `isolated` is its page with the headers by which threads are allowed.

    With `half-isolated` the page alone has them, and the browser refuses its workers.
    """

    def log_message(self, *_):
        pass

    def translate_path(self, path):
        return super().translate_path(path.replace("/half-isolated", "", 1).replace("/isolated", "", 1))

    def end_headers(self):
        if self.path.startswith("/isolated") or self.path == "/half-isolated/":
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@pytest.fixture(scope="module")
def site(tmp_path_factory, far):
    """Folder and address of the page beside a model in float32 and, as the pruned one, the same in int8."""
    folder = tmp_path_factory.mktemp("web")
    engines = ("web/build/far.js", "web/build/far-threads.js")
    (ROOT / "web/build").mkdir(exist_ok=True)
    with filelock.FileLock(ROOT / "web/build/lock"):  # two test processes share the checkout
        assert subprocess.run(["make", "-s", "-C", ROOT, *engines], check=False).returncode == 0
    (folder / "build").mkdir()
    shutil.copy(ROOT / "web/index.html", folder)
    for file in (ROOT / "web/build").glob("far*.[jw]*s*"):
        shutil.copy(file, folder / "build")
    model, config = load_model(far / "best.pth")
    facts = {"data": vars(config.preprocessing), "classes": CLASSES, "parameters": 1234}
    for name, precision in (("far", torch.float32), ("prune", torch.int8)):
        (folder / f"build/{name}.far").write_bytes(to_bytes(natural_form(model, precision), facts))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=TOOLS["chromium"], args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def opened(browser, address: str):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page


def answered(page, number: int = 0) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What a card says, its logits, and the image that the model read."""
    card = page.locator("article").nth(number)
    logits, image = (torch.tensor(json.loads(card.get_attribute(f"data-{name}"))) for name in ("logits", "image"))
    return card.locator(".answer").inner_text(), logits, image


def draw_a_seven(page) -> None:
    box = page.locator("#paper").bounding_box()
    x, y = box["x"], box["y"]
    page.mouse.move(x + 70, y + 50)
    page.mouse.down()
    page.mouse.move(x + 190, y + 50, steps=8)
    page.mouse.move(x + 110, y + 215, steps=12)
    page.mouse.up()
    page.wait_for_selector("article")


def test_a_seven_is_drawn_and_answered_as_python_does(site, browser, far):
    model, config = load_model(far / "best.pth")
    page = opened(browser, site[1])
    draw_a_seven(page)
    said, logits, image = answered(page)
    with torch.no_grad():
        expected = model(image.view(1, 3, 32, 32))[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert said == CLASSES[expected.argmax()]
    assert 0 < (answered(page, 1)[1] - expected).norm() < 0.05 * expected.norm()  # in int8
    grey = image.view(3, 32, 32).mul(torch.tensor(config.preprocessing.std)[:, None, None])[0]
    assert (
        grey[4].std() > 0 and grey[4].max() > grey[24, 24:].max()
    )  # the bar of a seven, and nothing below on its right
    assert re.search(r"1,234 parameters, [\d.]+ MB, [\d.]+ ms", page.locator("article").first.inner_text())
    page.click("#clear")
    assert page.locator("article").count() == 0


def test_an_isolated_page_answers_the_same_on_threads_or_on_one_where_workers_are_refused(site, browser):
    logits, threads = [], []
    for path in ("", "isolated/", "half-isolated/"):
        page = opened(browser, site[1] + path)
        draw_a_seven(page)
        logits.append(answered(page)[1])
        threads.append(page.locator("#threads").inner_text())
    most = min(4, page.evaluate("navigator.hardwareConcurrency"))
    assert threads == ["one thread", f"{most} threads" if most > 1 else "one thread", "one thread"]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_keys_draw_what_the_mouse_draws_and_a_picture_may_be_chosen(site, browser, far, tmp_path):
    model, config = load_model(far / "best.pth")
    page = opened(browser, site[1])
    page.focus("#paper")
    for key in (" ", *["ArrowRight"] * 4, *["ArrowDown"] * 9, " ", "ArrowLeft"):
        page.keyboard.press(key)
    page.wait_for_selector("article")
    page.keyboard.press("Escape")
    assert page.locator("article").count() == 0
    image = Digits(False).images[3].resize((200, 150), Image.NEAREST)
    image.save(tmp_path / "digit.png")
    page.set_input_files("#file", tmp_path / "digit.png")
    page.wait_for_selector("article")
    _, logits, seen = answered(page)
    expected = config.preprocessing.transform(32)(image)
    assert (seen.view(3, 32, 32) - expected).abs().max() < 0.05  # one of 255 greys, over the deviation
    torch.testing.assert_close(logits, model(expected[None])[0].detach(), rtol=0, atol=0.05)
    (tmp_path / "none.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "none.png")
    page.wait_for_function("document.getElementById('models').textContent.includes('no picture')")


def test_what_is_missing_or_damaged_is_said(site, browser):
    folder, address = site
    (folder / "build/teacher.far").write_bytes((folder / "build/far.far").read_bytes()[:-9])
    page = browser.new_page()
    try:
        page.goto(address)
        page.wait_for_function(
            "document.getElementById('models').textContent == 'build/teacher.far is cut short'", timeout=120_000
        )
    finally:
        (folder / "build/teacher.far").unlink()
