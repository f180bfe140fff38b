"""The real server on 127.0.0.1: routes, streams, health, metrics, and its end."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fakes import a_frame
from prometheus_client.parser import text_string_to_metric_families
from waiting import wait_until

from knet_runtime.counting import ZoneCounter
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.web import auth as address
from knet_runtime.zones import Line, Zone, Zones


def image(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB).astype(int)


def mjpg_parts(answer: HTTPResponse) -> Iterator[bytes]:
    assert answer.readline() == b"--frame\r\n"
    while True:
        assert answer.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(answer.readline().removeprefix(b"Content-Length:"))
        assert answer.readline() == b"\r\n"
        yield answer.read(length)
        assert answer.readline() == b"\r\n"
        assert answer.readline() == b"--frame\r\n"


def live_frames(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    while size := answer.read(4):
        head = json.loads(answer.read(int.from_bytes(size, "little")))
        answer.read(head["jpeg"] + 6 * head["runs"])
        yield head


def numbers(answer: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    while kind := answer.readline():
        data = answer.readline()
        assert answer.readline() == b"\n"
        yield (
            kind.decode().removeprefix("event: ").strip(),
            json.loads(data.removeprefix(b"data: ")),
        )


def test_the_page_loads_nothing_from_elsewhere(site: Any) -> None:
    status, headers, page = site.ask("/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert "server" not in headers
    text = page.decode()
    assert re.search(r'name="viewport" content="width=device-width', text)
    names = re.findall(r'(?:src|href)="([^"]+)"', text)
    files = {name for name in names if re.search(r"\.(css|js)$", name)}
    for name in list(files):
        imported = re.findall(r'from "\./([^"]+)"', site.ask(f"/{name}")[2].decode())
        files.update(imported)
    assert len(files) == 11
    for name in files:
        status, headers, body = site.ask(f"/{name}")
        assert status == 200
        assert re.match(r"text/(css|javascript)", headers["Content-Type"])
        assert not re.search(rb"https?://|@import|url\(|\beval\b", body)
    assert site.ask("/no-such-file")[0] == 404
    assert site.ask("/../page.py")[0] == 404
    assert site.ask("/", "POST", "x")[0] == 405


def test_the_mjpg_stream_moves_and_shows_the_overlay(site: Any) -> None:
    answer = site.open("/stream.mjpg")
    assert answer.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
    assert answer.headers["Cache-Control"] == "no-store"
    parts = mjpg_parts(answer)
    site.gate.step()
    first = image(next(parts))
    site.gate.step()
    second = image(next(parts))
    sky = (60 + np.array([128, 128, 128])) / 2
    assert np.abs(first[40, 70] - sky).max() < 12
    assert np.abs(first[87, 70] - 60).max() < 12  # ignored: no colour
    assert np.abs(first - second).max() > 60


def test_classes_that_are_not_chosen_have_no_colour(make_site: Any) -> None:
    site = make_site(classes=("road",))
    site.gate.step()
    for route in ("/snapshot.jpg", "/stream.mjpg"):
        body = (
            site.ask(route)[2] if route == "/snapshot.jpg" else next(mjpg_parts(site.open(route)))
        )
        one = image(body)
        assert np.abs(one[40, 70] - 60).max() < 12  # sky
        assert np.abs(one[40, 130] - (60 + np.array([128, 64, 128])) / 2).max() < 12
    _, set_up = next(numbers(site.open("/events")))
    assert [set_up["classes"][index]["name"] for index in set_up["shown"]] == ["Road"]


def test_a_stale_frame_is_marked_in_every_frame(site: Any) -> None:
    site.gate.step()
    site.gate.step(stale=True)
    answer = site.open("/stream.mjpg")
    marked = image(next(mjpg_parts(answer)))
    snapshot = image(site.ask("/snapshot.jpg")[2])
    for one in (marked, snapshot):
        assert one[0, 2, 0] > 150
        assert one[0, 2, 1] < 80
    answer = site.open("/live")
    assert next(live_frames(answer))["stale"] is True


def test_the_snapshot_is_the_newest_frame(site: Any) -> None:
    status, _, body = site.ask("/snapshot.jpg")
    assert (status, body) == (503, b"There is no frame yet.\n")
    site.gate.step()
    status, headers, body = site.ask("/snapshot.jpg")
    assert status == 200
    assert headers["Content-Type"] == "image/jpeg"
    assert image(body).shape == (90, 160, 3)


def test_several_feeds_are_told_apart(make_site: Any) -> None:
    site = make_site(feeds=("front", "rear & side"))
    front, rear = site.gates
    front.step()
    assert site.ask("/snapshot.jpg")[0] == 200  # the first one
    assert site.ask("/snapshot.jpg?feed=rear+%26+side")[0] == 503
    rear.step()
    assert site.ask("/snapshot.jpg?feed=rear+%26+side")[0] == 200
    for route in ("snapshot.jpg", "stream.mjpg", "live"):
        status, _, body = site.ask(f"/{route}?feed=%3Cscript%3E")
        assert status == 404
        assert body == b"There is no such feed; use front, rear & side.\n"
    rear.step()
    answer = site.open("/live?feed=rear+%26+side")
    assert next(live_frames(answer))["frame"] == 2


def test_the_grid_brings_the_newest_frames_of_all_feeds_by_one_stream(make_site: Any) -> None:
    site = make_site(feeds=("front", "rear", "side"))
    front, rear, side = site.gates
    frames = live_frames(site.open("/grid"))
    front.step()
    head = next(frames)
    assert (head["feed"], head["frame"], head["width"]) == ("front", 1, 160)
    for _ in range(3):
        rear.step()
    side.step()
    side.sink.close()
    seen = {"front": 1}
    while seen != {"front": 1, "rear": 3, "side": 1}:
        head = next(frames)
        assert head["frame"] > seen.get(head["feed"], 0)
        seen[head["feed"]] = head["frame"]
    step_large(site, 1)  # of the first feed
    head = next(frames)
    assert (head["feed"], head["width"], head["height"]) == ("front", 640, 360)
    front.sink.close()
    rear.step()
    assert next(frames)["frame"] == 4  # the others go on
    rear.sink.close()
    assert list(frames) == []


def test_health_follows_the_feed(site: Any) -> None:
    def health() -> tuple[int, bytes]:
        status, _, body = site.ask("/healthz")
        return status, body

    assert health() == (503, b"gate: waiting\n")
    site.gate.step()
    assert health() == (200, b"gate: running\n")
    site.gate.step(stale=True)
    assert health() == (503, b"gate: stale\n")
    site.gate.connected = False
    assert health() == (503, b"gate: disconnected\n")
    site.gate.connected = True
    site.gate.step()
    assert health() == (200, b"gate: running\n")
    site.gate.sink.close()
    assert health() == (503, b"gate: ended\n")
    assert site.ask("/snapshot.jpg")[0] == 200  # the last frame stays to be seen


def test_before_the_run_begins_every_feed_waits(make_site: Any) -> None:
    site = make_site(begun=False)
    assert site.ask("/healthz")[::2] == (503, b"gate: waiting\n")
    assert site.ask("/metrics")[0] == 200


def test_one_sick_feed_makes_the_whole_unhealthy_and_an_ended_one_does_not(make_site: Any) -> None:
    site = make_site(feeds=("a", "b"))
    for gate in site.gates:
        gate.step()
    assert site.ask("/healthz")[0] == 200
    site.gates[0].sink.close()
    assert site.ask("/healthz")[0] == 200
    site.gates[1].connected = False
    assert site.ask("/healthz")[0] == 503


def test_a_feed_that_failed_makes_the_whole_unhealthy(make_site: Any) -> None:
    site = make_site(feeds=("a", "b"))
    for gate in site.gates:
        gate.step()
    site.gates[0].sink.close(complete=False)
    assert site.ask("/healthz")[::2] == (503, b"a: failed\nb: running\n")


def test_metrics_are_what_the_run_counted(make_site: Any) -> None:
    site = make_site(feeds=("front", "rear"))
    site.gate.step()
    site.gate.step()
    status, headers, body = site.ask("/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert samples["knet_frames_total", "front"] == 2
    assert samples["knet_frames_total", "rear"] == 0
    assert samples["knet_frames_dropped_total", "front"] == 2
    assert samples["knet_reconnects_total", "front"] == 0
    assert samples["knet_state", "front", "running"] == 1
    assert samples["knet_state", "rear", "waiting"] == 1
    assert samples["knet_state", "rear", "running"] == 0
    assert 0 <= samples["knet_frame_age_seconds", "front"] < 10
    assert samples["knet_stage_seconds", "front", "0.95", "infer"] == pytest.approx(0.04)
    assert samples["knet_viewers",] == 0
    assert not any("python" in key[0] for key in samples)  # a registry of its own


def test_metrics_and_numbers_have_what_was_counted(site: Any) -> None:
    labels = LabelMap(("road", "car"), ((0, 0, 0), (0, 0, 142)), 255, things=(1,))
    square, line = ((0, 0), (60, 0), (60, 60), (0, 60)), ((0, 70), (160, 70))
    count = ZoneCounter(Zones((Zone("yard", square),), (Line("gate", line),), frames=1))
    for index, top in enumerate((20, 60)):  # out of the zone and over the line, to its right
        car = Instance(1, 0.9, 20, top, np.ones((20, 20), np.bool_), track=1)
        frame, _ = a_frame(index, hw=(90, 160))
        site.gate.sink.write(
            frame, count(frame, Segmentation.from_instances([car], (90, 160), labels))
        )
    text = site.ask("/metrics")[2].decode()
    for sample in (
        'knet_zone_present{class="car",feed="gate",zone="yard"} 0.0',
        'knet_zone_entered_total{class="car",feed="gate",zone="yard"} 1.0',
        'knet_zone_left_total{class="car",feed="gate",zone="yard"} 1.0',
        'knet_line_crossed_total{class="car",direction="to_right",feed="gate",line="gate"} 1.0',
    ):
        assert sample in text
    events = numbers(site.open("/events"))
    (feed,) = next(data for kind, data in events if kind == "numbers")["feeds"]
    assert feed["totals"]["lines"] == {"gate": {"car": {"to_left": 0, "to_right": 1}}}


def test_events_bring_the_classes_once_and_then_numbers_each_second(site: Any) -> None:
    answer = site.open("/events")
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = numbers(answer)
    kind, set_up = next(events)
    assert kind == "setup"
    assert set_up["feeds"] == ["gate"]
    assert set_up["classes"][0] == {"name": "Sky", "colour": [128, 128, 128]}
    assert (set_up["model"], set_up["engine"]) == ("street@0123456789ab", "openvino")
    kind, first = next(events)
    assert kind == "numbers"
    assert first["feeds"][0]["state"] == "waiting"
    site.gate.step()
    _, second = next(events)
    assert 0.8 < second["time"] - first["time"] < 3
    (feed,) = second["feeds"]
    assert (feed["name"], feed["state"], feed["frames"], feed["dropped"]) == (
        "gate",
        "running",
        1,
        2,
    )
    assert feed["stages"]["latency"] == {"p50": 31.0, "p95": 62.0, "p99": 93.0}


def test_head_of_a_stream_ends(site: Any) -> None:
    site.gate.step()
    for route in ("stream.mjpg", "live", "grid", "events"):
        status, _, body = site.ask(f"/{route}", "HEAD")
        assert (status, body) == (200, b"")


def test_streams_end_with_the_run(site: Any) -> None:
    answer = site.open("/live")
    images = live_frames(answer)
    site.gate.step()
    assert next(images)["frame"] == 1
    site.gate.sink.close()
    assert list(images) == []


def test_the_last_numbers_say_how_the_run_ended(make_site: Any) -> None:
    site = make_site(feeds=("front", "rear", "side"))
    events = numbers(site.open("/events"))
    assert [next(events)[0], next(events)[0]] == ["setup", "numbers"]
    front, rear, _ = site.gates
    front.step()
    front.sink.close()
    rear.sink.close(complete=False)
    assert site.ask("/healthz")[2] == b"front: ended\nrear: failed\nside: waiting\n"
    closing = threading.Thread(target=site.page.close)
    closing.start()
    *_, (kind, last) = events  # which end
    closing.join()
    assert kind == "numbers"
    assert [feed["state"] for feed in last["feeds"]] == ["ended", "failed", "waiting"]
    assert last["feeds"][0]["frames"] == 1
    assert 0 < last["seconds"] < 60


def sockets_and_threads() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def step_large(site: Any, count: int) -> None:
    """Frames of noise: as large as they get."""
    from knet_runtime.segmentation import Segmentation
    from knet_runtime.types import Frame
    from knet_synthetic import CAMVID11

    random = np.random.default_rng(0)
    image = random.integers(0, 256, (720, 1280, 3), np.uint8)
    mask = Segmentation(random.integers(0, 11, (720, 1280), np.uint8), CAMVID11, {})
    for index in range(count):
        site.gate.frames += 1
        site.gate.sink.write(Frame(image, index, None, str(index), time.time()), mask)
        time.sleep(0.05)


def test_it_closes_within_two_seconds_whatever_the_viewers_do(make_site: Any) -> None:
    before = sockets_and_threads()
    site = make_site()
    for path in ("/live", "/stream.mjpg", "/events", "/live", "/snapshot.jpg"):
        site.connect(get(path))
    for unfinished in (b"", b"GET / HTT"):
        site.connect(unfinished)
    step_large(site, 20)
    began = time.monotonic()
    site.page.close()
    assert time.monotonic() - began < 2
    site.close()  # closes the viewers; the page is closed already
    assert sockets_and_threads() == before
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", site.port), 1)
    site.gate.step()  # the run may be a step behind its page


def test_the_port_is_free_again_at_once(make_site: Any) -> None:
    first = make_site()
    first.gate.step()
    assert first.ask("/healthz")[0] == 200
    first.page.close()
    again = make_site(port=first.port)
    again.gate.step()
    assert again.ask("/healthz")[0] == 200


def test_a_viewer_that_never_reads_is_dropped_and_the_others_go_on(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "_STUCK_MS", 1000)
    site = make_site()
    for _ in range(3):
        site.connect(get("/live"))
    answer = site.open("/stream.mjpg")
    parts = mjpg_parts(answer)

    def viewers() -> float:
        return float(re.search(rb"\nknet_viewers (\S+)", site.ask("/metrics")[2])[1])

    wait_until(lambda: viewers() == 4, "four viewers")
    end = time.monotonic() + 15
    while viewers() > 1:
        assert time.monotonic() < end, "the stuck viewers are still there"
        step_large(site, 3)
        next(parts)


def test_nonsense_is_answered_or_dropped_and_leaves_no_trace(
    site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for request in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
        b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", site.port), 5) as one:
            one.sendall(request)
            site.gate.step()
            assert one.recv(64).startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
    assert site.ask("/healthz")[0] == 200
    assert not [record for record in caplog.records if record.exc_info]
