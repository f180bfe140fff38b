"""Who encodes what, when: never for nobody, once for everybody, and the run never waits."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame
from knet_runtime.web.streams import REST, Channel, FrameShot, Latest
from knet_synthetic import CAMVID11

IMAGE = np.zeros((4, 6, 3), np.uint8)
MASK = Segmentation(np.zeros((4, 6), np.uint8), CAMVID11, {})


class Encoder:
    """Takes ``seconds`` for a frame and counts them."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seen: list[int] = []
        self._seconds = seconds

    def __call__(self, shot: FrameShot) -> bytes:
        time.sleep(self._seconds)
        self.seen.append(shot.seq)
        return str(shot.seq).encode()


def put(latest: Latest, count: int = 1) -> None:
    for _ in range(count):
        latest.put(Frame(IMAGE, 0, None, "0"), MASK)


def test_nobody_watches_nothing_is_encoded() -> None:
    async def run() -> None:
        latest, encoder = Latest(), Encoder()
        latest.attach(asyncio.get_running_loop())
        with ThreadPoolExecutor(1) as pool:
            channel = Channel(latest, encoder, pool)
            put(latest, 50)
            await asyncio.sleep(0.1)
            assert encoder.seen == []
            made = await channel.newer(channel.start())
            assert made is not None
            assert (made.seq, made.data) == (50, b"50")
            put(latest, 50)  # the viewer has its frame, and asks for no other
            await asyncio.sleep(0.1)
            assert encoder.seen == [50]

    asyncio.run(run())


def test_many_viewers_share_each_frame_and_a_fresh_one_gets_none_older_than_its_arrival() -> None:
    async def run() -> None:
        latest, encoder = Latest(), Encoder()
        latest.attach(asyncio.get_running_loop())
        with ThreadPoolExecutor(1) as pool:
            channel = Channel(latest, encoder, pool)
            seen: list[list[int]] = [[] for _ in range(10)]

            async def view(got: list[int]) -> None:
                seq = channel.start()
                while (made := await channel.newer(seq)) is not None:
                    seq = made.seq
                    got.append(seq)

            viewers = [asyncio.create_task(view(got)) for got in seen]
            writer = threading.Thread(
                target=lambda: [put(latest) or time.sleep(0.01) for _ in range(60)]
            )
            writer.start()
            while writer.is_alive():
                await asyncio.sleep(0.01)
            put(latest)
            latest.end()
            await asyncio.wait_for(asyncio.gather(*viewers), 5)
            assert len(encoder.seen) == len(set(encoder.seen)) > 2
            for got in seen:
                assert got == sorted(set(got))
                assert set(got) <= set(encoder.seen)
                assert got[-1] == 61  # the last frame is shown, whoever ends
            late = await channel.newer(channel.start())
            assert late is not None
            assert late.seq == 61
            assert await channel.newer(61) is None

    asyncio.run(run())


def test_a_viewer_that_goes_takes_nothing_from_the_others() -> None:
    async def run() -> None:
        latest, encoder = Latest(), Encoder(0.05)
        latest.attach(asyncio.get_running_loop())
        with ThreadPoolExecutor(1) as pool:
            channel = Channel(latest, encoder, pool)
            going = asyncio.create_task(channel.newer(0))
            staying = asyncio.create_task(channel.newer(0))
            await asyncio.sleep(0.02)
            put(latest)
            await asyncio.sleep(0.02)
            going.cancel()
            made = await asyncio.wait_for(staying, 5)
            assert made is not None
            assert made.seq == 1
            assert going.cancelled()

    asyncio.run(run())


def test_encoding_takes_a_fifth_of_one_core_at_most() -> None:
    cost, span = 0.03, 1.2

    async def run() -> int:
        latest, encoder = Latest(), Encoder(cost)
        latest.attach(asyncio.get_running_loop())
        with ThreadPoolExecutor(1) as pool:
            channel = Channel(latest, encoder, pool)
            seq, end = 0, time.monotonic() + span
            while time.monotonic() < end:
                put(latest)
                made = await channel.newer(seq)
                assert made is not None
                seq = made.seq
        return len(encoder.seen)

    assert 2 <= asyncio.run(run()) <= span / (cost * (1 + REST)) + 2


def test_a_stuck_encoder_does_not_hold_up_the_run() -> None:
    async def run() -> None:
        latest, stuck, entered = Latest(), threading.Event(), threading.Event()
        latest.attach(asyncio.get_running_loop())

        def encode(shot: FrameShot) -> bytes:
            entered.set()
            stuck.wait(10)
            return b""

        with ThreadPoolExecutor(1) as pool:
            channel = Channel(latest, encode, pool)
            viewer = asyncio.create_task(channel.newer(0))
            put(latest)
            while not entered.is_set():
                await asyncio.sleep(0.01)
            writer = threading.Thread(target=put, args=(latest, 1000))
            writer.start()
            writer.join(5)
            assert not writer.is_alive()
            assert latest.shot is not None
            assert latest.shot.seq == 1001
            stuck.set()
            await asyncio.wait_for(viewer, 5)

    asyncio.run(run())
