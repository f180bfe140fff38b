"""The page in a real browser: it moves, it obeys, it fits, and it never passes old for new."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from fakes import a_frame

from knet_runtime.counting import ZoneCounter
from knet_runtime.painting import shade
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame
from knet_runtime.zones import Line, Zone, Zones
from knet_synthetic import CAMVID11

Open = Callable[..., Any]
ROAD, SKY = (128, 64, 128), (128, 128, 128)

PIXEL = """([id, x, y]) => {
  const data = document.getElementById(id).getContext("2d").getImageData(x, y, 1, 1).data;
  return [data[0], data[1], data[2]];
}"""
ALL_PIXELS = """id => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return data.reduce((sum, value, index) => (sum + value * (index % 8191)) % 1000000007, 0);
}"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
STATE = "document.body.dataset.state"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="the page is looked at with playwright: pip install playwright",
    )
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("there is no chromium to look at the page with: apt install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """A page of its own browser context; what it complains of fails the test."""
    contexts = []
    complaints: list[str] = []

    def go(
        port: int,
        *,
        width: int = 1280,
        height: int = 800,
        password: str | None = None,
        view: str = "",
        route: tuple[str, Callable[[Any], None]] | None = None,
    ) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            http_credentials=password and {"username": "", "password": password},
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        if route is not None:
            page.route(*route)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/{view}", wait_until="domcontentloaded")
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def near(seen: list[int], wanted: tuple[float, ...], by: float = 8) -> bool:
    return all(abs(a - b) <= by for a, b in zip(seen, wanted, strict=True))


def until(page: Any, holds: str, arg: object = None) -> None:
    """Ask from outside again and again: the page's own policy forbids what playwright would do."""
    end = time.monotonic() + 15
    while not page.evaluate(holds, arg):
        assert time.monotonic() < end, f"not within 15 s: {holds}"
        page.wait_for_timeout(50)


def wait_for_state(page: Any, *states: str) -> None:
    until(page, f"{list(states)}.includes({STATE})")


def test_the_frame_moves_beside_its_overlay(site: Any, move: Any, open_page: Open) -> None:
    page = open_page(site.port)
    wait_for_state(page, "waiting")
    move(site.gate)
    wait_for_state(page, "running")
    for canvas in ("camera", "overlay"):
        before = page.evaluate(ALL_PIXELS, canvas)
        until(page, f"before => ({ALL_PIXELS})({canvas!r}) !== before", before)
    assert page.evaluate("document.getElementById('camera').width") == 160
    assert page.inner_text("#model") == "street@0123456789ab on openvino"
    until(page, "/^[0-9.]+$/.test(document.querySelector('#tiles dd').textContent)")
    assert 5 < float(page.inner_text("#tiles dd")) < 40
    assert page.inner_text("#stages tr.total th") == "latency"


def test_toggles_and_opacity_act_at_once_on_a_frame_that_stands_still(
    site: Any, open_page: Open
) -> None:
    site.gate.step()
    page = open_page(site.port)
    wait_for_state(page, "running")
    page.wait_for_selector("#legend input")

    def overlay(x: int, y: int = 40) -> list[int]:
        return list(page.evaluate(PIXEL, ["overlay", x, y]))

    def mixed(colour: tuple[int, int, int], opacity: float) -> tuple[float, ...]:
        return tuple(60 + opacity * (value - 60) for value in colour)

    assert near(overlay(60), mixed(SKY, 0.5))
    assert near(overlay(120), mixed(ROAD, 0.5))
    assert near(overlay(120, 88), (60, 60, 60))  # ignored: the frame itself
    assert near(list(page.evaluate(PIXEL, ["camera", 120, 40])), (60, 60, 60))

    road = page.get_by_role("checkbox", name="Road", exact=True)
    road.uncheck()
    assert near(overlay(120), (60, 60, 60))
    assert near(overlay(60), mixed(SKY, 0.5))
    road.focus()
    page.keyboard.press("Space")
    assert near(overlay(120), mixed(ROAD, 0.5))

    slider = page.get_by_label("Opacity")
    slider.fill("100")
    assert near(overlay(120), ROAD)
    slider.press("ArrowLeft")
    assert page.inner_text("#opacity-value") == "99 %"
    slider.fill("0")
    assert near(overlay(120), (60, 60, 60))
    slider.fill("100")

    page.get_by_role("button", name="None").click()
    assert near(overlay(120), (60, 60, 60))
    assert near(overlay(60), (60, 60, 60))
    page.get_by_role("button", name="All").click()
    assert near(overlay(60), SKY)
    shares = page.locator("#legend li", has_text="Sky").locator("span")
    until(page, "document.querySelector('#legend span').textContent !== ''")
    assert shares.inner_text() == "47.2 %"  # 80 of 160 columns, 85 of 90 rows


def test_objects_have_shades_of_their_own_and_are_counted(site: Any, open_page: Open) -> None:
    site.gate.step()
    ids = np.ones((90, 160), np.uint16)
    ids[20:60, 20:60], ids[20:60, 100:140] = 2, 3
    car = CAMVID11.names.index("Car")
    labels = msgspec.structs.replace(CAMVID11, things=(car,))
    result = Segmentation.from_panoptic(ids, [3, car, car], [0.9, 0.8, 0.7], labels)
    frame = Frame(np.full((90, 160, 3), 60, np.uint8), 1, None, "000001", time.time())
    site.gate.sink.write(frame, result)
    page = open_page(site.port)
    wait_for_state(page, "running")
    page.wait_for_selector("#legend input")
    page.get_by_label("Opacity").fill("100")
    for segment, x in ((2, 40), (3, 120)):
        assert near(page.evaluate(PIXEL, ["overlay", x, 40]), shade(CAMVID11.palette[car], segment))
    assert near(page.evaluate(PIXEL, ["overlay", 80, 80]), CAMVID11.palette[3])
    cars = page.locator("#legend li", has_text="Car").locator("span")
    until(page, "[...document.querySelectorAll('#legend span')].some((one) => one.textContent)")
    assert cars.inner_text() == "2 · 22.2 %"
    page.get_by_role("checkbox", name="Car", exact=True).uncheck()
    assert near(page.evaluate(PIXEL, ["overlay", 40, 40]), (60, 60, 60))


def test_the_pointer_or_a_tap_says_what_is_under_it(site: Any, open_page: Open) -> None:
    ids = np.ones((90, 160), np.uint16)
    ids[20:60, 20:60], ids[20:60, 100:140], ids[80:] = 2, 3, 0
    car = CAMVID11.names.index("Car")
    labels = msgspec.structs.replace(CAMVID11, things=(car,))
    tracks = [None, 12, None]
    result = Segmentation.from_panoptic(ids, [3, car, car], [0.9, 0.8, 0.7], labels, {}, tracks)
    gate = Zones(lines=(Line("gate", ((0, 70), (160, 70))),))
    counted = ZoneCounter(gate)(a_frame(0, hw=(90, 160))[0], result.with_tracks({2: 12, 3: 7}))
    frame = Frame(np.full((90, 160, 3), 60, np.uint8), 1, None, "000001", time.time())
    site.gate.sink.write(frame, replace(result, counts=counted.counts))
    page = open_page(site.port)
    wait_for_state(page, "running")
    page.wait_for_selector("#legend input")
    road = tuple(0.6 * 60 + 0.4 * value for value in CAMVID11.palette[3])
    assert near(page.evaluate(PIXEL, ["overlay", 150, 65]), road)
    assert not near(page.evaluate(PIXEL, ["overlay", 150, 70]), road, 30)  # the gate

    def said(canvas: str, x: int, y: int) -> list[str]:
        box = page.locator(f"#{canvas}").bounding_box()
        page.mouse.move(box["x"] + x / 160 * box["width"], box["y"] + y / 90 * box["height"])
        shown = page.locator(".hover:visible")
        return [one.inner_text() for one in shown.all()]

    assert said("overlay", 40, 40) == ["Car · track 12 · score 0.80 · 1,600 px"]
    assert near(page.evaluate(PIXEL, ["overlay", 30, 30]), (138, 138, 138))  # lit up
    assert said("camera", 120, 40) == ["Car 3 · score 0.70 · 1,600 px"]
    assert not near(page.evaluate(PIXEL, ["overlay", 30, 30]), (138, 138, 138))
    assert said("overlay", 80, 40) == ["Road · score 0.90 · 9,600 px"]
    assert said("overlay", 80, 85) == []
    page.mouse.move(0, 0)
    assert page.locator(".hover:visible").count() == 0


def test_zones_and_lines_where_nothing_was_counted_yet_have_a_row(
    site: Any, open_page: Open
) -> None:
    car = CAMVID11.names.index("Car")
    labels = msgspec.structs.replace(CAMVID11, things=(car,))
    ids = np.zeros((90, 160), np.uint16)
    ids[20:60, 20:60] = 1
    result = Segmentation.from_panoptic(ids, [car], [0.8], labels).with_tracks({1: 1})
    yard = Zone("yard", ((10, 10), (80, 10), (80, 80), (10, 80)))
    far = Zone("far", ((100, 10), (150, 10), (150, 80), (100, 80)))
    count = ZoneCounter(Zones((yard, far), (Line("gate", ((0, 70), (160, 70))),)))
    for number in range(4):
        frame, _ = a_frame(number, hw=(90, 160))
        counted = count(frame, result)
        site.gate.sink.write(frame, counted)
    page = open_page(site.port)
    wait_for_state(page, "running")
    until(page, "document.querySelectorAll('#counts tbody tr').length > 0")
    rows = page.evaluate(
        "[...document.querySelectorAll('#counts tbody tr')].map("
        "row => [...row.cells].map(cell => cell.textContent))"
    )
    assert rows == [
        ["yard", "Car", "1", "1", "0"],
        ["far", "–", "0", "0", "0"],
        ["gate", "–", "", "0", "0"],
    ]


def test_only_chosen_classes_are_coloured_at_first(make_site: Any, open_page: Open) -> None:
    site = make_site(classes=("Sky",))
    site.gate.step()
    page = open_page(site.port)
    wait_for_state(page, "running")
    assert near(page.evaluate(PIXEL, ["overlay", 120, 40]), (60, 60, 60))
    page.get_by_role("checkbox", name="Road").check()
    assert near(page.evaluate(PIXEL, ["overlay", 120, 40]), tuple(30 + value / 2 for value in ROAD))


def test_a_source_that_goes_away_is_seen_at_once_and_its_return_too(
    site: Any, move: Any, open_page: Open
) -> None:
    mover = move(site.gate)
    page = open_page(site.port)
    wait_for_state(page, "running")
    page.evaluate("window.sameDocument = true")
    for _ in range(2):
        mover.gone.set()
        wait_for_state(page, "stale", "disconnected")
        assert page.inner_text("#state") == "STALE"
        assert page.title().startswith("STALE")
        for alarm in page.locator("#frames .alarm").all():
            assert alarm.is_visible()
            assert alarm.inner_text().startswith("STALE")
        frozen = page.evaluate(ALL_PIXELS, "camera")
        mover.gone.clear()
        wait_for_state(page, "running")
        until(page, f"before => ({ALL_PIXELS})('camera') !== before", frozen)
        assert not page.locator("#frames .alarm").first.is_visible()
    assert page.evaluate("window.sameDocument") is True
    assert site.gate.reconnects == 2


def test_a_server_that_goes_away_is_seen_and_its_return_too(
    make_site: Any, move: Any, open_page: Open
) -> None:
    first = make_site()
    mover = move(first.gate)
    page = open_page(first.port)
    wait_for_state(page, "running")
    page.get_by_role("checkbox", name="Pole").uncheck()
    mover.done.set()
    first.page.close()
    wait_for_state(page, "lost")
    assert page.inner_text("#state") == "NO CONNECTION"
    assert page.locator("#frames .alarm").first.is_visible()
    again = make_site(port=first.port)
    move(again.gate)
    wait_for_state(page, "running")
    before = page.evaluate(ALL_PIXELS, "overlay")
    until(page, f"before => ({ALL_PIXELS})('overlay') !== before", before)
    assert not page.get_by_role("checkbox", name="Pole").is_checked()


def test_frames_that_stop_while_numbers_go_on_are_stale(
    site: Any, move: Any, open_page: Open
) -> None:
    site.gate.step()
    answer = site.open("/live")
    size = answer.read(4)
    head = answer.read(int.from_bytes(size, "little"))
    told = json.loads(head)
    only = size + head + answer.read(told["jpeg"] + 6 * told["runs"])
    asked: list[str] = []

    def once(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(body=only) if len(asked) == 1 else route.abort()

    page = open_page(site.port, route=("**/live?*", once))
    wait_for_state(page, "running")
    move(site.gate)
    wait_for_state(page, "stale")
    assert site.ask("/healthz")[0] == 200
    page.unroute("**/live?*")
    wait_for_state(page, "running")


def test_an_ended_run_says_so_also_when_nobody_answers_any_more(
    make_site: Any, open_page: Open
) -> None:
    site = make_site()
    for _ in range(3):
        site.gate.step()
    page = open_page(site.port)
    wait_for_state(page, "running")
    site.gate.sink.close()
    site.page.close()
    wait_for_state(page, "ended")
    page.wait_for_timeout(4500)  # longer than the silence of a connection that is lost
    assert page.evaluate(STATE) == "ended"
    assert page.inner_text("#state") == "The run has ended"
    assert page.title().startswith("The run has ended")
    alarm = page.locator("#frames .alarm").first
    assert alarm.is_visible()
    assert re.fullmatch(r"The run has ended\n3 frames in \d+ s", alarm.inner_text())
    again = make_site(port=site.port)
    again.gate.step()
    wait_for_state(page, "running")
    again.gate.sink.close(complete=False)
    wait_for_state(page, "failed")
    assert page.inner_text("#state") == "The run has failed"


def test_feeds_are_chosen_with_the_keyboard(make_site: Any, move: Any, open_page: Open) -> None:
    site = make_site(feeds=("front", "rear"))
    front, rear = site.gates
    front.step()
    rear.step()
    rear.sink.write(*wide(400))
    page = open_page(site.port)
    page.get_by_role("radio", name="All").focus()
    page.keyboard.press("ArrowRight")
    until(page, "document.getElementById('camera').width === 160")
    page.keyboard.press("ArrowRight")
    until(page, "document.getElementById('camera').width === 400")
    assert page.locator("footer a").first.get_attribute("href").endswith("jpg?feed=rear")
    rear.connected = False
    wait_for_state(page, "disconnected")
    page.get_by_label("front").check()
    wait_for_state(page, "running")
    labels = page.locator("#feeds label")
    assert labels.nth(2).get_attribute("data-feed-state") == "disconnected"


def test_all_feeds_are_seen_at_once_each_with_its_own_state(
    make_site: Any, move: Any, open_page: Open
) -> None:
    names = ("front", "rear & side", "yard", "gate", "roof")
    site = make_site(feeds=names)
    front, rear, yard, gate, _ = site.gates
    mover = move(front)
    move(rear)
    yard.step()
    yard.sink.close()
    gate.step()
    gate.sink.close(complete=False)
    page = open_page(site.port, width=1280)
    states = "[...document.querySelectorAll('.tile')].map((one) => one.dataset.state)"
    until(page, f"({states}).join() === 'running,running,ended,failed,waiting'")
    assert page.evaluate(STATE) == "failed"
    assert page.inner_text("#state") == "2 of 5 live"
    pixel = """number => {
      const canvas = document.querySelectorAll('.tile canvas')[number];
      return [...canvas.getContext('2d').getImageData(60, 40, 1, 1).data].slice(0, 3);
    }"""
    assert near(page.evaluate(pixel, 2), tuple(30 + value / 2 for value in SKY))
    page.get_by_role("checkbox", name="Sky", exact=True).uncheck()
    assert near(page.evaluate(pixel, 2), (60, 60, 60))
    page.get_by_role("checkbox", name="Sky", exact=True).check()
    tops = [box.bounding_box()["y"] for box in page.locator(".tile").all()]
    assert (len(set(tops)), tops[0], tops[3]) == (2, tops[2], tops[4])
    assert page.evaluate(OVERFLOW) == 0
    until(page, "/^[0-9.]+ frames.s$/.test(document.querySelector('.tile .soft').textContent)")
    mover.gone.set()
    until(page, f"['stale', 'disconnected'].includes(({states})[0])")
    assert page.locator(".tile .alarm").first.inner_text().startswith("STALE")

    page.locator(".tile", has_text="rear & side").focus()
    page.keyboard.press("Enter")
    wait_for_state(page, "running")
    assert page.evaluate("location.hash") == "#feed=rear%20%26%20side"
    assert page.locator("#grid").is_hidden()
    assert page.get_by_label("rear & side").is_checked()
    page.reload(wait_until="domcontentloaded")
    wait_for_state(page, "running")
    assert page.locator("#camera").is_visible()
    page.go_back()
    until(page, f"({states})[1] === 'running'")
    assert page.locator("#frames").is_hidden()


def test_the_frame_or_the_grid_fills_the_screen(make_site: Any, move: Any, open_page: Open) -> None:
    site = make_site(feeds=("front", "rear"))
    movers = [move(gate) for gate in site.gates]
    page = open_page(site.port)
    wait_for_state(page, "running")
    full = "(document.fullscreenElement?.querySelector('canvas') ?? {}).id"
    page.get_by_role("button", name="Full screen").click()
    until(page, "document.fullscreenElement?.id === 'grid'")
    for tile in page.locator(".tile").all():
        box = tile.bounding_box()
        assert box["height"] > 700
        assert box["x"] + box["width"] <= 1280
    page.locator(".tile").first.click()  # which leads to its feed, still over the whole screen
    until(page, f"{full} === 'overlay'")
    wait_for_state(page, "running")
    canvas = page.locator("#overlay")
    until(page, "document.getElementById('overlay').clientHeight === innerHeight")
    assert canvas.bounding_box()["width"] == 1280
    page.mouse.move(1270, 400)  # the road, on the right
    assert page.locator(".hover:visible").inner_text() == "Road"
    movers[0].gone.set()
    wait_for_state(page, "stale", "disconnected")
    alarm = page.locator("#frames figure:last-child .alarm")
    assert alarm.bounding_box()["y"] == 0
    assert alarm.inner_text().startswith("STALE")
    page.keyboard.press("f")
    until(page, "document.fullscreenElement === null")
    page.keyboard.press("Control+f")
    page.keyboard.press("f")
    until(page, f"{full} === 'overlay'")


def test_sixteen_feeds_come_by_one_connection(make_site: Any, open_page: Open) -> None:
    site = make_site(feeds=tuple(f"camera {number}" for number in range(16)))
    for gate in site.gates:
        gate.step()
    page = open_page(site.port, width=400, view="#all")
    wait_for_state(page, "running")
    assert page.locator(".tile[data-state=running]").count() == 16
    assert page.evaluate("fetch('healthz').then((answer) => answer.status)") == 200
    assert page.evaluate(OVERFLOW) == 0
    assert b"\nknet_viewers 1.0\n" in site.ask("/metrics")[2]


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_it_fits_a_phone_and_a_desk(
    make_site: Any, move: Any, open_page: Open, width: int, height: int
) -> None:
    site = make_site(feeds=("a-camera-with-a-name-that-does-not-want-to-end", "rear"))
    mover = move(site.gate)
    name = site.gate.name
    page = open_page(site.port, width=width, height=height, view=f"#feed={name}")
    wait_for_state(page, "running")
    page.wait_for_selector("#stages tr")
    assert page.evaluate(OVERFLOW) == 0
    camera, overlay = (page.locator(f"#{name}").bounding_box() for name in ("camera", "overlay"))
    if width < 500:
        assert overlay["y"] > camera["y"] + camera["height"] - 1
        assert overlay["width"] > 0.9 * (width - 32)
    else:
        assert overlay["y"] == camera["y"]
    for box in page.locator("#legend label").all()[:3]:
        assert box.bounding_box()["height"] >= 24
    mover.gone.set()
    wait_for_state(page, "stale", "disconnected")
    assert page.evaluate(OVERFLOW) == 0


def test_a_hidden_page_asks_for_nothing(site: Any, move: Any, open_page: Open) -> None:
    move(site.gate)
    page = open_page(site.port)
    wait_for_state(page, "running")
    # A headless browser never hides a page, so the page is told that it is hidden.
    hide = """hidden => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    viewers = (
        "fetch('metrics').then(r => r.text()).then(t => +t.match(/\\nknet_viewers (\\S+)/)[1])"
    )
    page.evaluate(hide, True)
    until(page, f"async () => await {viewers} === 0")
    page.evaluate(hide, False)
    until(page, f"async () => await {viewers} === 1")
    wait_for_state(page, "running")


def test_a_browser_gives_the_token_as_its_password(
    make_site: Any, move: Any, open_page: Open
) -> None:
    site = make_site(token="correct-horse-battery")
    move(site.gate)
    page = open_page(site.port, password="correct-horse-battery")
    wait_for_state(page, "running")
    page.reload(wait_until="domcontentloaded")
    wait_for_state(page, "running")
    refused = open_page(site.port, password="wrong-horse")
    refused.get_by_text("A token is needed").wait_for()


def wide(width: int) -> tuple[Any, Any]:
    import numpy as np

    from knet_runtime.segmentation import Segmentation
    from knet_runtime.types import Frame
    from knet_synthetic import CAMVID11

    image = np.full((90, width, 3), 90, np.uint8)
    return Frame(image, 0, None, "0"), Segmentation(np.zeros((90, width), np.uint8), CAMVID11, {})
