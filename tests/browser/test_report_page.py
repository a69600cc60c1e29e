"""The pages in a real browser: no error, no request, and sorting, hovering, filter and dark mode work."""

import shutil

import pytest

from evaluation_world import write_evaluation
from inside_world import make_inside
from loralab.report.page import write
from mended_world import write_sweep
from report_world import make_sweep

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium or Chrome is installed: the page is not opened")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=FOUND, args=switches)
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Open an address; at the end look whether the page was quiet."""
    pages = []

    def open_page(address: str):
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        pages.append((page, address, said, asked))
        return page

    yield open_page
    for page, address, said, asked in pages:
        page.close()
        assert said == [], "errors in the console"
        assert set(asked) == {address}, "the page asks for nothing but itself"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write(make_sweep(tmp_path_factory.mktemp("browser"))).as_uri()


@pytest.fixture
def page(opened, address):
    return opened(address)


@pytest.fixture(scope="module")
def evaluation_address(tmp_path_factory):
    return write(write_evaluation(tmp_path_factory.mktemp("browser") / "evaluation")).as_uri()


@pytest.fixture
def evaluation(opened, evaluation_address):
    return opened(evaluation_address)


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


# The page of an evaluation


def test_a_chip_takes_a_delta_out_of_tables_and_figures(evaluation):
    chip = evaluation.locator(".chip[data-filter='full']")
    rows = evaluation.locator("#items tbody tr:visible")
    before = rows.count()
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert evaluation.locator("main [data-method='full']:visible").count() == 0
    assert rows.count() == before * 2 // 3
    chip.click()
    assert rows.count() == before


def test_a_bar_tells_its_counts(evaluation):
    bar = evaluation.locator("#items .parts").first
    bar.scroll_into_view_if_needed()
    bar.hover()
    assert evaluation.locator("#tip").inner_text() == bar.get_attribute("aria-label")
    widths = [box["width"] for part in bar.locator("i").all() if (box := part.bounding_box())]
    assert sum(widths) == pytest.approx(bar.bounding_box()["width"], abs=1.0)


def test_the_keyboard_reaches_the_marks_of_an_evaluation(evaluation):
    mark = evaluation.locator("#results .figure").nth(1).locator(".mark").first
    mark.focus()
    assert evaluation.locator("#tip").inner_text() == mark.get_attribute("data-tip")
    evaluation.keyboard.press("Escape")
    assert evaluation.locator("#tip").is_hidden()


def test_examples_are_folded_until_asked_for(evaluation):
    fold = evaluation.locator("#items details.block").first
    assert fold.locator(".card").first.is_hidden()
    fold.locator("summary").first.click()
    assert fold.locator(".card").first.is_visible()
    more = fold.locator("details.more").first
    assert more.locator("li").first.is_hidden()
    more.locator("summary").click()
    assert more.locator("li").first.is_visible()


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_an_evaluation_fits_the_screen_with_everything_open(evaluation, width):
    evaluation.set_viewport_size({"width": width, "height": 844})
    evaluation.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert evaluation.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_parts_of_a_bar_are_told_apart_from_paper_and_each_other(evaluation, scheme):
    evaluation.emulate_media(color_scheme=scheme)
    paper = evaluation.evaluate("getComputedStyle(document.body).backgroundColor")
    colours = evaluation.locator(".parts-legend i").evaluate_all(
        "all => all.map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len({*colours, paper}) == 5


# The pages of spectra and of a repair


@pytest.fixture(scope="module")
def inside_address(tmp_path_factory):
    return write(make_inside(tmp_path_factory.mktemp("browser") / "inside", depth=2)).as_uri()


def test_a_cell_of_a_map_tells_its_count_and_a_chip_takes_its_delta_away(opened, inside_address):
    page = opened(inside_address)
    cell = page.locator("#deltas .figure").first.locator(".mark").nth(3)
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # onto the number that stands on it
    assert page.locator("#tip").inner_text() == cell.get_attribute("data-tip")
    page.locator(".chip[data-filter='lora-hot']").click()
    assert page.locator("main [data-method='lora-hot']:visible").count() == 0
    page.locator("#changes summary", has_text="Every matrix").click()
    rows = page.locator("#changes table.sortable tbody tr:visible")
    page.locator("#changes").get_by_role("button", name="size").click()
    sizes = [float(text) for text in rows.locator("td:nth-child(11)").all_inner_texts()]
    assert len(sizes) == 8 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("width", [390, 1280])
def test_spectra_and_repairs_fit_the_screen_with_everything_open(opened, inside_address, tmp_path, width):
    for address in (inside_address, write(write_sweep(tmp_path / "sweep")).as_uri()):
        page = opened(address)
        page.set_viewport_size({"width": width, "height": 844})
        page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
