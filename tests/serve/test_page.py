"""The web page in a real browser, before a real gateway: what people do with it, and that nothing is blocked."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_worker import running_server
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from serve.access import AccessConfig
from serve.form import JobRequest
from serve.gateway import GatewayConfig
from serve.jobs import KeyLimits
from serve.pages import add_page

pytestmark = pytest.mark.slow

QUICK = GatewayConfig(events_poll_s=0.05)
DESKTOP, PHONE = (1280, 800), (390, 844)
LONGEST_S = 60
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WATCH = """
window.seen = {phases: [], shares: [], previews: []};
const view = document.querySelector('#progress-view');
new MutationObserver(() => {
  const note = (list, value) => value && list.at(-1) !== value && list.push(value);
  note(seen.phases, view.querySelector('.phase').textContent);
  const share = Number(view.querySelector('.meter').getAttribute('aria-valuenow'));
  if (view.dataset.state === 'running') note(seen.shares, share);
  note(seen.previews, view.querySelector('.preview').getAttribute('src'));
}).observe(view, {subtree: true, attributes: true, childList: true, characterData: true});
"""
# The browser's database answers when `release` is called.
SLOW_DATABASE = """
const open = IDBFactory.prototype.open;
IDBFactory.prototype.open = function (...given) {
  const request = open.apply(this, given);
  const set = done => request.addEventListener('success', () => { window.release = done; });
  return Object.defineProperty(request, 'onsuccess', {set});
};
"""
GIVE = """
const [kind, files] = arguments, data = new DataTransfer();
for (const [name, type, text] of files) {
  data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, {type}));
}
if (kind === 'paste') document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}));
else for (const step of ['dragenter', 'dragover', 'drop']) {
  const told = new DragEvent(step, {dataTransfer: data, bubbles: true, cancelable: true});
  document.querySelector('#stage').dispatchEvent(told);
}
"""


class Page:
    """A browser with the page in it."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self._folder = driver, folder

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.find("#service-status").get_attribute("data-state") != "checking")

    def look(self, size: tuple[int, int], scheme: str = "light") -> None:
        """As on a screen of `size` CSS pixels, with the colours a system asks for."""
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        # Without transitions, of which a screenshot would show the middle.
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        return WebDriverWait(self.driver, LONGEST_S, 0.05).until(lambda _: condition(), what)

    def shows(self, selector: str) -> Any:
        """The element, once it is seen."""
        self.until(lambda: self.find(selector).is_displayed(), f"{selector} is not seen")
        return self.find(selector)

    def says(self, selector: str, text: str) -> None:
        """Waits until it does."""
        try:
            self.until(lambda: text in self.find(selector).text)
        except TimeoutException as error:
            seen = self.find("body").text
            raise AssertionError(f"{selector} does not say {text!r}; the page says {seen!r}") from error

    def choose(self, *pictures: Path) -> None:
        """Through the file dialog."""
        self.find("#file-input").send_keys("\n".join(map(str, pictures)))
        self.until(lambda: self.find("#start").is_enabled())

    def give(self, kind: str, *files: tuple[str, str, bytes]) -> None:
        """Drops or pastes (name, media type, content)."""
        self.run(GIVE, kind, [[name, media_type, base64.b64encode(data).decode()] for name, media_type, data in files])

    def start(self, **fields: str) -> None:
        """Fills in fields by their names, and begins."""
        for name, value in fields.items():
            field = self.find(f"#settings [name={name}]")
            field.clear()
            field.send_keys(value)
        self.until(lambda: self.find("#start").is_enabled())
        self.find("#start").click()

    def screenshot(self, name: str) -> None:
        """For people to look at; and nothing may be wider than the screen."""
        self.driver.save_screenshot(str(self._folder / f"{name}.png"))
        assert self.run("return document.documentElement.scrollWidth <= innerWidth"), name

    def check_console(self, *statuses: int) -> None:
        """Nothing was blocked, nothing thrown, and only answers of `statuses` were refusals.

        A service without a replica is not ready, and the page asks.
        """
        expected = re.compile(
            r"/readyz - .*status of 503|the server responded with a status of (\d+)|net::ERR_INTERNET_DISCONNECTED"
        )
        for entry in self.driver.get_log("browser"):
            found = expected.search(entry["message"])
            is_expected = found is not None and (found[1] is None or int(found[1]) in statuses)
            assert entry["level"] in ("INFO", "DEBUG") or is_expected, entry["message"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    assert program, "the browser test needs Debian's chromium"
    assert driver_program, "the browser test needs Debian's chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_program))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Every test has a gateway on a port of its own, so that nothing is left of the test before it."""
    folder = tmp_path_factory.getbasetemp() / "screenshots"
    folder.mkdir(exist_ok=True)
    page = Page(browser, folder)
    page.look(DESKTOP)
    yield page
    browser.get("about:blank")
    browser.get_log("browser")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A PNG of 96 x 64 px with something to see in it."""
    rows, columns = np.mgrid[0:64, 0:96]
    rgb = np.stack([columns * 2, rows * 3, 255 - columns * 2], axis=-1).astype(np.uint8)
    rgb[16:48:8, 20:76] = 250
    path = tmp_path / "old photo.png"
    Image.fromarray(rgb).save(path)
    return path


@contextmanager
def offline(page: Page) -> Iterator[None]:
    """Without a network."""
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**network, "offline": True})
    try:
        yield
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**network, "offline": False})


def split_of(page: Page) -> int:
    return int(page.find(".split").get_attribute("aria-valuenow"))


def zoom_of(page: Page) -> int:
    return int(page.find(".zoom-value").text.removesuffix(" %"))


def test_a_picture_is_sent_watched_and_downloaded_as_the_service_made_it(
    page: Page, serving: Any, working: Any, photo: Path, tmp_path: Path
) -> None:
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    with serving(QUICK) as url, working(step_s=0.08):
        page.open(url)
        page.screenshot("desktop-light-empty")
        place = page.find("#start").rect
        page.choose(photo)
        page.says("#estimate", "MP")
        assert page.find("#start").rect == place, "it does not move when an estimate comes"
        page.find("[name=scale][value='2'] + span").click()
        page.says(".draft-facts", "becomes 192 \u00d7 128 px")
        page.screenshot("desktop-light-chosen")
        page.run(WATCH)
        page.start(num_inference_steps="25", prompt="Stripes on a colourful wall")
        page.until(lambda: len(page.run("return seen.previews")) >= 2)
        page.screenshot("desktop-light-appearing")
        page.shows("#compare-view")
        seen = page.run("return seen")
        assert any("step" in phase for phase in seen["phases"]), seen["phases"]
        assert seen["shares"] == sorted(seen["shares"])
        assert all(preview.startswith("data:image/webp") for preview in seen["previews"])
        page.screenshot("desktop-light-done")
        page.find(".download").click()
        saved = tmp_path / "old photo-2x.png"
        page.until(saved.exists)
        job = httpx.get(f"{url}/v1/jobs").json()["jobs"][0]
        assert (job["request"]["scale"], job["num_steps"]) == (2, 25)
        assert job["request"]["prompt"] == "Stripes on a colourful wall"
        assert saved.read_bytes() == httpx.get(url + job["links"]["result"]).content
        page.check_console()


def test_before_and_after_are_compared_with_the_mouse_and_with_the_keyboard(
    page: Page, serving: Any, working: Any, photo: Path
) -> None:
    with serving(QUICK) as url, working():
        page.open(url)
        page.choose(photo)
        page.start()
        window, slider = page.shows("#compare-view .window"), page.find(".split")
        assert (slider.get_attribute("role"), split_of(page)) == ("slider", 50)
        ActionChains(page.driver, 0).drag_and_drop_by_offset(page.find(".grip"), window.size["width"] // 4, 0).perform()
        assert 73 <= split_of(page) <= 77
        before = split_of(page)
        slider.send_keys(Keys.ARROW_LEFT)
        assert split_of(page) == before - 1
        slider.send_keys(Keys.SHIFT, Keys.ARROW_RIGHT)
        slider.send_keys(Keys.HOME)
        assert split_of(page) == 0
        slider.send_keys(Keys.END)
        assert split_of(page) == 100
        fitted = zoom_of(page)
        window.send_keys("+")
        assert zoom_of(page) == pytest.approx(fitted * 1.5, abs=1)
        window.send_keys("1")
        assert zoom_of(page) == 100
        window.send_keys("0")
        assert zoom_of(page) == fitted
        ActionChains(page.driver).scroll_from_origin(_middle_of(window), 0, -400).perform()
        assert zoom_of(page) > fitted
        place = page.find(".after img").get_attribute("style")
        window.send_keys(Keys.ARROW_RIGHT)
        assert page.find(".after img").get_attribute("style") != place
        page.find(".fit").click()
        assert zoom_of(page) == fitted
        page.find("[data-side=before]").click()
        assert not page.find(".pane.after").is_displayed()
        page.screenshot("desktop-light-before")
        page.check_console()


def test_fingers_pinch_to_zoom_on_a_phone_and_nothing_is_wider_than_its_screen(
    page: Page, serving: Any, working: Any, photo: Path
) -> None:
    page.look(PHONE)
    with serving(QUICK) as url, working(step_s=0.05):
        page.open(url)
        page.screenshot("phone-light-empty")
        page.choose(photo)
        more = page.find(".advanced summary")
        # It may lie below the bar with the start button, where people scroll and drivers do not.
        page.run("arguments[0].scrollIntoView({block: 'center'})", more)
        more.click()
        page.screenshot("phone-light-chosen")
        page.start()
        page.shows("#progress-view")
        page.screenshot("phone-light-appearing")
        page.shows("#compare-view")
        page.screenshot("phone-light-done")
        assert page.run("return scrollY") == 0, "the picture is what one sees"
        fitted, box = zoom_of(page), page.find(".window").rect
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind, apart in (("touchStart", 40), ("touchMove", 80), ("touchMove", 120), ("touchEnd", None)):
            points = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.until(lambda: zoom_of(page) > 2 * fitted)
        page.look(PHONE, "dark")
        page.screenshot("phone-dark-done")
        page.check_console()


def test_the_page_is_light_or_dark_as_the_system_is_unless_one_is_chosen(page: Page, serving: Any) -> None:
    def brightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.run("return getComputedStyle(document.body).backgroundColor"))[:3]))

    with serving(QUICK) as url:
        page.open(url)
        light = brightness()
        page.look(DESKTOP, "dark")
        page.until(lambda: brightness() < light / 4)
        page.screenshot("desktop-dark-empty")
        page.find("#theme-toggle").click()
        assert brightness() == light
        page.open(url)
        assert brightness() == light, "what was chosen lasts"
        page.check_console()


def test_several_pictures_are_dropped_and_pasted_and_what_is_no_picture_is_named(
    page: Page, serving: Any, working: Any, photo: Path
) -> None:
    data = photo.read_bytes()
    with serving(QUICK) as url:
        page.open(url)
        page.give("drop", ("one.png", "image/png", data), ("notes.txt", "text/plain", b"words"))
        page.says(".refused-files", "notes.txt")
        page.give("paste", ("two.png", "image/png", data))
        page.says(".tray-title", "2 pictures")
        page.says("#start", "Restore 2 pictures")
        page.find("[aria-label='Remove one.png']").click()
        page.says(".tray-title", "1 picture")
        kept = page.find("[aria-label='Remove two.png']")
        assert page.driver.switch_to.active_element == kept, "the focus goes to the next"
        page.find("[name=scale][value='3'] + span").click()
        page.says(".draft-facts", "becomes 288 \u00d7 192 px")
        assert page.find("[aria-label='Remove two.png']") == kept, "cards are not made anew"
        page.give("drop", ("three.png", "image/png", data), ("four.png", "image/png", data))
        page.says(".tray-title", "3 pictures")
        page.screenshot("desktop-light-several")
        page.start()
        page.until(lambda: len(page.all(".frame[data-state=queued]")) == 3, "three wait")
        page.until(lambda: "2 before it" in page.all(".frame")[0].text, "the newest comes last")
        page.all(".frame")[0].click()
        page.says(".phase", "2 pictures before this one")
        page.screenshot("desktop-light-waiting")
        with working():
            page.until(lambda: len(page.all(".frame[data-state=done]")) == 3, "three are done")
        assert len(httpx.get(f"{url}/v1/jobs").json()["jobs"]) == 3
        page.check_console()


def test_a_job_that_is_cancelled_or_fails_says_so_and_can_be_sent_again(
    page: Page, serving: Any, working: Any, photo: Path
) -> None:
    with serving(QUICK) as url:
        page.open(url)
        page.choose(photo)
        page.start()
        page.says(".phase", "Next in line")
        page.find(".cancel").click()
        page.says(".message-title", "Cancelled")
        page.screenshot("desktop-light-cancelled")
        page.find(".message-actions .primary").click()
        with working():
            page.start(prompt="please fail")
            page.says(".message-title", "The picture was refused")
            page.says(".message-text", "The model refuses it")
            page.screenshot("desktop-light-failed")
            page.find(".message-actions .primary").click()
            assert page.find("#prompt").get_attribute("value") == "please fail"
            page.start(prompt="")
            page.shows("#compare-view")
        assert [job["state"] for job in httpx.get(f"{url}/v1/jobs").json()["jobs"]] == ["done", "failed", "cancelled"]
        page.check_console()


def test_what_would_be_refused_is_told_before_it_is_sent_next_to_what_is_wrong(
    page: Page, serving: Any, photo: Path
) -> None:
    with serving(QUICK) as url:
        page.open(url)
        page.give("drop", ("broken.png", "image/png", b"\x89PNG not at all"))
        page.says(".draft .field-problem", "not a picture it can read")
        page.screenshot("desktop-light-refused")
        assert not page.find("#start").is_enabled()
        page.find(".clear").click()
        large = io.BytesIO()
        Image.new("RGB", (2400, 1800)).save(large, "PNG")
        page.give("drop", ("large.png", "image/png", large.getvalue()))
        page.says(".draft .field-problem", "The result would be too large")
        page.says(".draft .field-problem", "scale of at most 3")
        page.find("[name=scale][value='2'] + span").click()
        page.until(lambda: page.find("#start").is_enabled(), "a smaller scale is allowed")
        steps = page.find("#steps")
        steps.clear()
        steps.send_keys("900")
        page.find("#start").click()
        page.says("#num_inference_steps-problem", "from 1 to 200")
        assert page.run("return document.activeElement.id") == "steps"
        assert httpx.get(f"{url}/v1/jobs").json()["jobs"] == []
        page.check_console(413, 415, 422)


def test_a_reload_loses_nothing_neither_what_is_done_nor_what_was_not_sent_yet(
    page: Page, serving: Any, working: Any, photo: Path
) -> None:
    with serving(QUICK) as url, working():
        page.open(url)
        page.choose(photo)
        page.start()
        page.shows("#compare-view")
        page.driver.refresh()
        page.shows("#compare-view .split")
        assert page.find(".pane.before img").get_attribute("src").startswith("blob:"), "the original is still here"
        page.says(".frame-name", "old photo.png")
        page.find("#new-picture").click()
        page.choose(photo)
        with offline(page):
            page.start()
            page.shows("#connection")
            page.says("#service-status", "Offline")
            page.screenshot("desktop-light-offline")
            time.sleep(0.3)
        page.driver.refresh()
        page.until(lambda: len(page.all(".frame[data-state=done]")) == 2, "the second is sent after the reload")
        assert len(httpx.get(f"{url}/v1/jobs").json()["jobs"]) == 2
        assert not page.find("#connection").is_displayed()
        page.check_console()


def test_a_picture_that_is_sent_before_the_browsers_database_answers_stays_in_sight(
    page: Page, serving: Any, photo: Path
) -> None:
    added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SLOW_DATABASE})
    try:
        with serving(QUICK) as url:
            page.open(url)
            page.choose(photo)
            page.start()
            page.says(".phase", "Waiting to be sent")
            page.run("release()")
            page.says(".phase", "Next in line")
            assert len(page.all(".frame")) == 1
            assert len(httpx.get(f"{url}/v1/jobs").json()["jobs"]) == 1
            page.check_console()
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_key_is_asked_for_checked_and_kept_for_the_tab_alone_unless_wanted(
    page: Page, serving: Any, working: Any, store: Any, photo: Path
) -> None:
    _, token = store.create_key("archive", limits=KeyLimits())
    with serving(GatewayConfig(access=AccessConfig(mode="keys"), events_poll_s=0.05)) as url, working(step_s=0.03):
        page.open(url)
        page.shows("#key-dialog")
        page.screenshot("desktop-light-key")
        page.find("#key-value").send_keys("not the key", Keys.ENTER)
        page.says("#key-problem", "unknown or revoked")
        page.find("#key-value").clear()
        page.find("#key-value").send_keys(token, Keys.ENTER)
        page.until(lambda: not page.find("#key-dialog").is_displayed())
        page.choose(photo)
        page.start()
        page.shows("#compare-view")
        assert page.run("return [localStorage['faithdiff.key'], sessionStorage['faithdiff.key']]") == [None, token]
        page.find("#key-button").click()
        page.says("#key-usage", "archive: 1 requests")
        page.check_console(401)


def test_the_form_has_the_services_own_names_defaults_and_limits(page: Page, serving: Any) -> None:
    # Programs alone ask for these.
    fields = {
        n: f for n, f in JobRequest.model_json_schema()["properties"].items() if n not in ("priority", "webhook_url")
    }
    script = """const controls = Array.from(document.querySelector('#settings').elements).filter(c => c.name);
    return controls.map(c => ({name: c.name, min: c.min, max: c.max, longest: c.maxLength, value: c.value,
      checked: c.checked, type: c.type, choices: c.options && Array.from(c.options, o => o.value)}));"""
    with serving(QUICK) as url:
        page.open(url)
        controls = page.run(script)
        hidden = [part.get_attribute("data-field") for part in page.all("#settings .field[hidden]")]
    assert hidden == ["auto_prompt"], "there is no captioner"
    assert {control["name"] for control in controls} == set(fields)
    for control in controls:
        field = fields[control["name"]]
        if control["type"] == "number":
            # JavaScript counts in whole numbers up to 2**53 - 1.
            assert float(control["min"]) == field["minimum"]
            assert float(control["max"]) == min(field["maximum"], 2**53 - 1)
            assert float(control["value"]) == field["default"]
        elif control["type"] == "radio":
            assert field["minimum"] <= int(control["value"]) <= field["maximum"]
            assert control["checked"] == (int(control["value"]) == field["default"])
        elif control["type"] == "checkbox":
            assert control["checked"] == field["default"]
        elif control["type"] == "textarea":
            assert control["longest"] == field["maxLength"]
        else:
            assert (control["value"], sorted(control["choices"])) == (field["default"], sorted(field["enum"]))


def test_pictures_may_be_left_to_a_captioner_where_there_is_one(page: Page, serving: Any) -> None:
    with_captioner = QUICK.model_copy(
        update={"starts_from_zero": True, "intake": QUICK.intake.model_copy(update={"has_captioner": True})}
    )
    with serving(with_captioner) as url:
        page.open(url)
        page.find("details.advanced summary").click()
        assert page.shows("#settings [name=auto_prompt]").is_enabled()
        page.find("#settings [name=prompt]").send_keys("A lighthouse")
        page.until(lambda: not page.find("#settings [name=auto_prompt]").is_enabled())


def test_events_are_read_however_the_network_cuts_them(page: Page, serving: Any) -> None:
    first = 'event: progress\nid: -1\ndata: {"a":\ndata: 1}\n\n'
    stream = f"retry: 1000\n\n: here\n\n{first}event: done\r\nid: ended\r\ndata: {{}}\r\n\r\n"
    script = """const [stream, size, done] = arguments;
    import('/ui/job_stream.js').then(({EventParser}) => {
      const parser = new EventParser(), events = [];
      for (let at = 0; at < stream.length; at += size) events.push(...parser.push(stream.slice(at, at + size)));
      done(events);
    });"""
    with serving(QUICK) as url:
        page.open(url)
        for size in (1, 2, 3, 7, 1000):
            events = page.driver.execute_async_script(script, stream, size)
            assert [(e["event"], e["id"], json.loads(e["data"])) for e in events] == [
                ("progress", "-1", {"a": 1}),
                ("done", "ended", {}),
            ]
        page.check_console()


def test_every_file_the_page_names_is_there_and_nothing_comes_from_elsewhere() -> None:
    from fastapi import FastAPI

    api = FastAPI()
    add_page(api)
    with running_server(api) as url:
        index = httpx.get(f"{url}/").text
        names = set(re.findall(r'(?:src|href)="(ui/[^"#]+)', index)) | {"ui/app.js"}
        for name in sorted(names):
            answer = httpx.get(f"{url}/{name}")
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache"), name
        folder = Path(add_page.__code__.co_filename).with_name("ui")
        for path in folder.iterdir():
            text = path.read_text()
            outside = [u for u in re.findall(r"https?://[^\s\"'<>]+", text) if not u.startswith("http://www.w3.org/")]
            imported = re.findall(r'from "\./([^"]+)"', text)
            assert outside == [], path.name
            assert [name for name in imported if not (folder / name).is_file()] == [], path.name


def _middle_of(element: Any) -> Any:
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    return ScrollOrigin.from_element(element)
