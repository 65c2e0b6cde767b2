"""The page in a real browser: no errors, plots drawn, readable in any theme and in print."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium
from made_run import HOSTILE, MadeRun
from PIL import Image

from qpruner.report.files import write_report
from qpruner.report.snapshot import read_snapshot
from qpruner.runs.run_dir import RunDir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = MadeRun(tmp_path_factory.mktemp("long") / "run")
    write_report(made.run)
    return made.run.root


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Yield a function that opens a page offline and waits for its plots; console messages and
    requests fail a test."""
    contexts = []
    complaints = []

    def open_page(path: Path, **options: Any) -> Any:
        context = browser.new_context(offline=True, **options)
        context.set_default_timeout(5 * 60_000)  # milliseconds; a busy machine is no failure
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"{error}"))
        page.on(
            "request",
            lambda request: request.url.startswith("file:") or complaints.append(request.url),
        )
        page.goto(path.as_uri())
        page.wait_for_function(
            "document.querySelectorAll('figure[data-plot]').length === "
            "document.querySelectorAll('[data-drawn]').length"
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def test_plots_are_drawn_with_descriptions_and_answer_a_pointer(
    opened: Any, long_run: Path
) -> None:
    page = opened(long_run / "report.html")
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    figures = page.locator("figure[data-plot]")
    assert figures.count() == 3
    for number in range(3):
        picture = figures.nth(number).locator("svg")
        assert picture.bounding_box()["height"] > 50
        assert (
            picture.get_attribute("aria-label")
            or figures.nth(number).locator("[aria-label]").count()
        )
    # 199 scored trials, each a mark that tells its plan when pointed at.
    marks = page.locator('figure[data-plot="pareto"] path[aria-roledescription="point"]')
    assert marks.count() >= 199
    marks.nth(3).hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert re.search(r"plan\s*[48]{60}", page.locator("#vg-tooltip-element").inner_text())
    measured = read_snapshot(RunDir(long_run, create=False)).results.sensitivity
    assert measured
    figure = page.locator('figure[data-plot="plans"]')
    place = measured.groups.index("layers.07.mlp")
    values = next(
        method.values for name, method in measured.methods.items() if name != "mutual_information"
    )
    cell = figure.locator('path[aria-label*="layers.07.mlp;"][aria-label*="predicted rise"]').first
    [told] = re.findall("predicted rise: ([^;]+)", cell.get_attribute("aria-label"))
    assert float(told) == pytest.approx(values["nf4"][place] - values["int8"][place], rel=0.01)


def test_the_first_stop_of_the_keyboard_leads_to_the_answer(opened: Any, long_run: Path) -> None:
    page = opened(long_run / "report.html")
    page.keyboard.press("Tab")
    assert page.locator("a.skip:focus").bounding_box()["x"] >= 0, "it shows itself"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")


def test_hostile_names_run_no_script(opened: Any, tmp_path: Path) -> None:
    write_report(
        MadeRun(tmp_path / "run", 6, 2, HOSTILE, task=HOSTILE, outcome="failed", error=HOSTILE).run
    )
    page = opened(tmp_path / "run" / "report.html")
    assert page.title() == "qpruner: run"
    assert page.locator("header code").inner_text().startswith("</script>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_window_and_text_is_readable(
    opened: Any, long_run: Path, scheme: str
) -> None:
    page = opened(
        long_run / "report.html", color_scheme=scheme, viewport={"width": 1280, "height": 900}
    )
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#answer svg.marks text, #answer .against svg").last.is_visible()
        bottom = page.locator("#answer").bounding_box()
        assert width == 390 or bottom["y"] + bottom["height"] < 800, (
            "table, picture and how sure on one screen"
        )
    pairs = [
        ("--text", "--page"),
        ("--text", "--panel"),
        ("--muted", "--page"),
        ("--muted", "--panel"),
    ]
    pairs.append(("--link", "--page"))
    pairs += [("--better", "--page"), ("--failed", "--page")]
    for text, ground in pairs:
        assert contrast(*(variable(page, name) for name in (text, ground))) >= 4.5, (text, ground)
    drawn = page.locator('figure[data-plot="pareto"] .role-axis text').first
    assert drawn.evaluate("element => getComputedStyle(element).fill") == rgb(
        variable(page, "--text")
    )
    # The first screen needs no scrolling sideways, and in a large window none at all.
    first = page.locator("#answer .scroll")
    assert first.evaluate("it => it.scrollWidth <= it.clientWidth")
    # Elsewhere nothing but a shadow at the edge tells that there are columns out of sight.
    page.locator("#claim summary").click()
    table = page.locator("#claim .scroll").nth(1)
    colour = tuple(int(variable(page, "--page")[at : at + 2], 16) for at in (1, 3, 5))
    sides = {}
    for where in ("start", "end"):
        table.evaluate("(it, end) => { it.scrollLeft = end ? it.scrollWidth : 0; }", where == "end")
        picture = Image.open(io.BytesIO(table.screenshot())).convert("RGB")
        # Of a column of pixels most are no text, heading or line.
        columns = [
            [picture.getpixel((x, y)) for y in range(picture.height)]
            for x in (0, picture.width - 1)
        ]
        sides[where] = [Counter(column).most_common(1)[0][0] != colour for column in columns]
    assert sides == {"start": [False, True], "end": [True, False]}


def test_print_unfolds_all_parts_in_light_colours(
    opened: Any, long_run: Path, tmp_path: Path
) -> None:
    page = opened(long_run / "report.html", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    folded = page.locator("details:not([open])")
    num_folded = folded.count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded.count() == 0 < num_folded
    assert variable(page, "--page") == "#ffffff"
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 with margins
    pdf = page.pdf(format="A4", path=tmp_path / "page.pdf")
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") > 5
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folded.count() == num_folded


def variable(page: Any, name: str) -> str:
    return str(
        page.evaluate(
            f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()"
        )
    )


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5))})"


def contrast(one: str, other: str) -> float:
    """Return WCAG 2's contrast ratio of two colours."""

    def luminance(color: str) -> float:
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4
            for each in channels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
