"""The page in a real browser: no error, no request, and its sorting, hovering, filter and dark mode work."""

import shutil

import pytest

from loralab.report.page import write
from report_world import make_sweep

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium or Chrome is installed: the page is not opened")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write(make_sweep(tmp_path_factory.mktemp("browser"))).as_uri()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=FOUND, args=switches)
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert said == [], "errors in the console"
    assert set(asked) == {address}, "the page asks for nothing but itself"


def column(page, number):
    return page.locator("#c1 table.sortable").first.locator(f"tbody tr > :nth-child({number})").all_inner_texts()


def numbers(texts):
    return [float(text.split("±")[0].replace("−", "-")) for text in texts]


def test_a_click_on_a_head_sorts(page):
    before = column(page, 1)
    head = page.locator("#c1 table.sortable").first.get_by_role("button", name="learned")
    head.click()
    falling = numbers(column(page, 3))
    assert falling == sorted(falling, reverse=True)
    assert head.locator("xpath=..").get_attribute("aria-sort") == "descending"
    head.click()
    assert numbers(column(page, 3)) == sorted(falling)
    page.locator("#c1 table.sortable").first.get_by_role("button", name="run").click()
    assert sorted(before) == sorted(column(page, 1)) and column(page, 1)[0].strip().startswith("COLA")


def test_pointing_near_a_mark_tells_its_values_and_picks_out_its_run(page):
    mark = page.locator("#c1 .figure").first.locator(".mark").nth(2)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 6, box["y"] + box["height"] / 2)
    assert page.locator("#tip").inner_text() == mark.get_attribute("data-tip")
    run = mark.get_attribute("data-run")
    lit = page.locator("#c1 tbody tr.lit")
    assert {row.get_attribute("data-run") for row in lit.all()} == {run}
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden() and page.locator(".lit").count() == 0


def test_the_keyboard_reaches_the_marks(page):
    mark = page.locator("#c1 .figure").first.locator(".mark").first
    mark.focus()
    assert page.locator("#tip").inner_text() == mark.get_attribute("data-tip")
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_chip_takes_a_method_out_of_tables_and_figures(page):
    chip = page.locator(".chip[data-filter='lora']")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert page.locator("main [data-method='lora']:visible").count() == 0
    assert page.locator("#c1 table.sortable").first.locator("tbody tr:visible").count() == 3
    assert page.locator("#c1 .figure").first.locator("text:visible", has_text="LoRA r16").count() == 0
    chip.click()
    assert page.locator("#c1 table.sortable").first.locator("tbody tr:visible").count() == 6


def test_dark_and_light(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.locator(".theme").click()
    dark = page.evaluate(paper)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 23, 27)")
    label = page.locator("#c1 .figure text").first
    assert label.evaluate("e => getComputedStyle(e).fill") == page.evaluate("getComputedStyle(document.body).color")
    page.locator(".theme").click()
    assert page.evaluate(paper) == light
    page.emulate_media(color_scheme="dark")
    page.reload()
    assert page.evaluate(paper) == dark, "the system's choice comes first"


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == width
