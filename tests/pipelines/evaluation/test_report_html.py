"""The page in a real browser, opened from a file. Chromium and its driver come with the README's install."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from pipelines.evaluation.report_html import write

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
    "--window-size=1300,900",
)


def program(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    assert found, f"{names[0]} is not installed: apt-get install chromium chromium-driver"
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "google-chrome", "chromium-browser")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, written_report) -> Iterator[webdriver.Chrome]:
    """The page of the small evaluation, freshly opened; nothing may have been logged when the test is over."""
    browser.get("about:blank")
    browser.get(write(written_report).as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def texts(page, selector):
    return [found.text for found in page.find_elements(By.CSS_SELECTOR, selector)]


def style(page, selector, name):
    return page.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name
    )


def open_first_picture(page):
    page.find_element(By.CSS_SELECTOR, ".picture").click()
    WebDriverWait(page, 20).until(
        lambda d: d.execute_script(
            "const images = [...document.querySelectorAll('.pane img')];"
            "return images.every((image) => image.complete && image.naturalWidth > 0)"
        )
    )


def split_percent(page):
    return int(page.find_element(By.ID, "divider").get_attribute("aria-valuenow"))


def test_the_table_of_means_sorts_by_any_column_both_ways(page):
    def click(title):
        button = next(b for b in page.find_elements(By.CSS_SELECTOR, "#score-table thead button") if title in b.text)
        button.click()
        heading = page.find_element(By.CSS_SELECTOR, "#score-table th[aria-sort]")
        return heading.get_attribute("aria-sort"), texts(page, "#score-table tbody th")

    best_first = ["ours", "SeeSR", "Real-ESRGAN"]
    assert click("psnr") == ("descending", best_first)
    assert click("psnr") == ("ascending", best_first[::-1])
    assert click("lpips") == ("ascending", best_first)
    assert click("method") == ("ascending", ["ours", "Real-ESRGAN", "SeeSR"])


def test_means_show_intervals_counts_and_what_is_missing(page):
    row = page.find_element(By.XPATH, "//*[@id='score-table']//tr[th[text()='Real-ESRGAN']]").text
    assert re.search(r"22\.\d\d\n\d\d\.\d\d \u2013 \d\d\.\d\d\nn=11, 1 missing", row)
    assert "missing" in row.splitlines()[-1]
    gaps = page.find_element(By.ID, "missing").text
    assert (
        "musiq \u2013 ours (12 of 12), SeeSR (12 of 12), Real-ESRGAN (11 of 12): weights of musiq are not here" in gaps
    )


def test_differences_are_shown_on_demand(page):
    page.find_element(By.XPATH, "//button[text()='Ours minus others']").click()
    assert texts(page, "#score-table tbody th") == ["SeeSR", "Real-ESRGAN"]
    assert "better on 100% of 11, 1 unpaired" in page.find_element(By.ID, "score-table").text
    assert page.find_elements(By.CSS_SELECTOR, "#score-table td.better")


def test_pictures_come_worst_first_and_those_without_a_score_last(page):
    values = [float(text) for text in texts(page, ".picture b")]
    assert values == sorted(values)
    assert len(values) == 12
    Select(page.find_element(By.ID, "sort-metric")).select_by_visible_text("lpips")
    values = [float(text) for text in texts(page, ".picture b")]
    assert values == sorted(values, reverse=True)
    Select(page.find_element(By.ID, "sort-method")).select_by_visible_text("Real-ESRGAN")
    assert texts(page, ".picture b")[-1] == "no score"
    assert "1 without a score at the end" in page.find_element(By.ID, "picture-count").text


def test_pictures_can_be_found_by_name_and_listed_as_a_table(page):
    page.find_element(By.ID, "find").send_keys("STREET/0")
    assert len(page.find_elements(By.CSS_SELECTOR, ".picture")) == 6
    page.find_element(By.CSS_SELECTOR, "#picture-view button[value='table']").click()
    page.find_element(By.CSS_SELECTOR, "#picture-list thead button").click()
    names = texts(page, "#picture-list tbody th")
    assert names == sorted(names)
    assert len(names) == 6
    page.find_element(By.CSS_SELECTOR, "#picture-list .link").click()
    assert page.find_element(By.ID, "viewer-title").text == names[0]


def test_the_divider_follows_the_mouse_and_the_keys(page):
    open_first_picture(page)
    stage = page.find_element(By.ID, "stage")
    divider = page.find_element(By.CSS_SELECTOR, "#divider i")
    quarter = stage.size["width"] // 4
    ActionChains(page).click_and_hold(divider).move_by_offset(-quarter, 0).release().perform()
    assert split_percent(page) == 25
    assert "25%" in style(page, "#pane-right", "clipPath")
    assert divider.rect["x"] + divider.rect["width"] / 2 == pytest.approx(stage.rect["x"] + quarter, abs=2)
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert split_percent(page) == 27
    ActionChains(page).send_keys(Keys.END).perform()
    assert split_percent(page) == 100
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert split_percent(page) == 100


def test_any_two_results_can_be_compared_and_swapped(page):
    open_first_picture(page)
    left, right = (Select(page.find_element(By.ID, side)) for side in ("left", "right"))
    assert [option.text for option in left.options] == ["lq", "ours", "SeeSR", "hq"]
    left.select_by_visible_text("SeeSR")
    right.select_by_visible_text("hq")
    ActionChains(page).move_to_element(page.find_element(By.ID, "stage")).perform()
    page.find_element(By.CSS_SELECTOR, "[data-do=swap]").click()
    sources = [image.get_attribute("src") for image in page.find_elements(By.CSS_SELECTOR, ".pane img")]
    assert ["/pictures/hq/" in sources[0], "/pictures/SeeSR/" in sources[1]] == [True, True]
    assert all(source.startswith("file://") for source in sources)


def test_both_sides_zoom_and_move_together(page):
    open_first_picture(page)

    def placed():
        moves = [image.get_attribute("style") for image in page.find_elements(By.CSS_SELECTOR, ".pane img")]
        assert moves[0] == moves[1]
        x, y, scale = re.search(r"translate\((.+?)px, (.+?)px\) scale\((.+?)\)", moves[0]).groups()
        return float(x), float(y), float(scale)

    x, y, scale = placed()
    for _ in range(4):
        ActionChains(page).send_keys("+").perform()
    x_in, y_in, scale_in = placed()
    assert scale_in == pytest.approx(scale * 1.5**4, rel=1e-4)
    stage = page.find_element(By.ID, "stage")
    start = ActionChains(page).move_to_element_with_offset(stage, 120, 60)
    start.click_and_hold().move_by_offset(30, -40).release().perform()
    assert placed() == (pytest.approx(x_in + 30), pytest.approx(y_in - 40), pytest.approx(scale_in))
    ActionChains(page).send_keys("0").perform()
    assert placed() == (pytest.approx(x), pytest.approx(y), pytest.approx(scale))
    page.execute_script(
        "const at = {deltaY: -400, clientX: 600, clientY: 300, cancelable: true};"
        "arguments[0].dispatchEvent(new WheelEvent('wheel', at))",
        stage,
    )
    assert placed()[2] > scale


def test_side_by_side_shows_both_pictures_whole(page):
    open_first_picture(page)
    ActionChains(page).send_keys("s").perform()
    assert page.find_element(By.ID, "mode").get_attribute("aria-pressed") == "true"
    assert [style(page, f"#pane-{side}", "clipPath") for side in ("left", "right")] == ["none", "none"]
    image, pane = (page.find_element(By.CSS_SELECTOR, s).rect for s in ("#pane-left img", "#pane-left"))
    assert image["width"] <= pane["width"] + 1


def test_keys_go_from_picture_to_picture_in_the_order_of_the_list(page):
    order = texts(page, ".picture .name")
    open_first_picture(page)
    ActionChains(page).send_keys("n").perform()
    assert page.find_element(By.ID, "viewer-title").text == order[1]
    ActionChains(page).send_keys("pp").perform()
    assert page.find_element(By.ID, "viewer-title").text == order[-1]
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert page.find_element(By.ID, "viewer").get_attribute("open") is None


def test_a_link_opens_its_picture(page, written_report):
    page.get("about:blank")
    page.get((written_report / "report.html").as_uri() + "#picture=street%2F03%20street%20%233")
    assert page.find_element(By.ID, "viewer-title").text == "street/03 street #3"


def test_a_chart_leaves_out_what_cannot_be_scored_and_says_what_is_missing(browser, report_with_reference):
    browser.get(write(report_with_reference).as_uri())
    charts = {text.splitlines()[0]: text for text in texts(browser, "#charts figure")}
    psnr, ssim = (next(text for title, text in charts.items() if title.startswith(name)) for name in ("psnr", "ssim"))
    assert "hq" not in psnr.split()
    assert "12 missing" in ssim
    assert "hq" in ssim.split()


def test_a_dot_of_a_chart_opens_its_picture(page):
    dot = page.find_element(By.CSS_SELECTOR, "#charts .other .dot")
    page.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", dot)
    assert page.find_element(By.ID, "viewer-title").text
    assert Select(page.find_element(By.ID, "right")).first_selected_option.text == "SeeSR"


def test_the_papers_numbers_stand_beside_ours(page):
    row = page.find_element(By.XPATH, "//table[@class='paper']//tr[th[starts-with(., 'FaithDiff')]]").text
    assert re.search(r"24\.29\*\n26\.\d\d\nn=12\n\+1\.\d", row)
    assert "not found" in page.find_element(By.XPATH, "//table[@class='paper']//tr[th[starts-with(., 'PASD')]]").text
    assert "found in no source" in page.find_element(By.ID, "paper").text


def test_the_whole_protocol_is_on_the_page(page):
    facts = page.find_element(By.ID, "facts").text
    for text in ("restoration.num_inference_steps\n20", "metrics.ssim.channel\ny", "pyiqa\n0.1.13", "5f" * 32):
        assert text in facts


def test_dark_and_light_can_be_chosen(page):
    page.execute_script("localStorage.clear()")
    page.refresh()
    button = page.find_element(By.ID, "theme")
    seen = {}
    for theme in ("light", "dark"):
        button.click()
        assert button.text == f"Theme: {theme}"
        seen[theme] = style(page, "body", "backgroundColor")
    assert seen == {"light": "rgb(246, 247, 249)", "dark": "rgb(15, 18, 22)"}
    page.refresh()
    assert page.find_element(By.ID, "theme").text == "Theme: dark"


def test_a_narrow_screen_never_scrolls_sideways(page):
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") == 360
        page.execute_script("openPicture(report.pictures[0].name)")
        assert page.find_element(By.ID, "viewer").rect["width"] == 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints(page):
    printed = page.execute_cdp_cmd("Page.printToPDF", {})
    assert len(printed["data"]) > 10_000


def test_the_page_asks_for_nothing_from_outside(written_report):
    text = write(written_report).read_text()
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", text) == []
    assert "default-src 'none'" in text


def test_hostile_names_and_reasons_stay_text(browser, make_report):
    evil = "</script><img src=x onerror=document.title='owned'> {{script}}"
    folder = make_report(names=("a", evil.replace("/", "_")), protocol={"name": evil}, model={evil: evil})
    browser.get(write(folder).as_uri())
    assert browser.title == f"Evaluation: {evil}"
    assert browser.find_element(By.TAG_NAME, "h1").text == evil
    open_first_picture(browser)


def test_the_same_report_gives_the_same_bytes_and_leaves_nothing_else(make_report):
    folder = make_report(names=("a",))
    first = write(folder).read_bytes()
    assert write(folder).read_bytes() == first
    assert sorted(p.name for p in folder.iterdir()) == ["pictures", "report.html", "report.json", "scores.parquet"]
