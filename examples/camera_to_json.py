#!/usr/bin/env python3
"""A camera's objects as JSON on stdout, one line a frame, until Ctrl-C or SIGTERM.

    python3 camera_to_json.py camera:0
    python3 camera_to_json.py rtsp://gate.example/1 --bundle street-panoptic | jq .
    python3 camera_to_json.py drive.mp4 --frames 100

A camera that goes away is opened again, for ten minutes; meanwhile nothing is written. With an
instance or panoptic model objects keep their number from frame to frame; a semantic one gives the
share of each class. ``knet-deploy run SOURCE --json -`` writes more, in a format that is
documented: this shows how to write one's own.
"""

import argparse
import json
import signal
import sys
import threading

from knet_deploy import (
    Feed,
    KnetError,
    OutputClosed,
    Pipeline,
    Segmenter,
    SourceOptions,
    Tracker,
    open_source,
)


class Objects:
    """One line of JSON for each frame."""

    name, path = "stdout", None

    def write(self, frame, result):
        if frame.stale:  # the last picture again, because the camera sends nothing
            return
        line = {"frame": frame.index}
        if frame.wall is not None:  # a camera's: seconds since the epoch
            line["time"] = frame.wall
        elif frame.pts is not None:  # a file's: seconds since its start, an exact fraction
            line["time"] = float(frame.pts)
        if result.task == "semantic":
            shares = result.shares().items()
            line["shares"] = {name: round(share, 4) for name, share in shares if share}
        else:
            line["objects"] = [
                {"id": one.track, "class": one.label, "score": round(one.score, 2), "box": one.box}
                for one in result.segments
                if one.is_thing
            ]
        try:
            print(json.dumps(line, ensure_ascii=False), flush=True)
        except BrokenPipeError as error:
            raise OutputClosed("whoever read stdout has gone") from error

    def close(self, *, complete=True):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="whatever knet-deploy run takes")
    parser.add_argument("--bundle")
    parser.add_argument("--frames", type=int, help="stop after as many")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    camera = SourceOptions(max_downtime=600)
    with Segmenter(options.bundle) as segment, open_source(options.source, camera) as source:
        segment.self_test()
        # Semantic results have no objects to follow.
        tracker = None if segment.bundle.manifest.task == "semantic" else Tracker()
        feed = Feed(source, [Objects()], transform=tracker)
        with Pipeline([feed], segment, max_frames=options.frames) as pipeline:
            pipeline.join(stop)


if __name__ == "__main__":
    try:
        main()
    except KnetError as error:  # its text says what to do
        sys.exit(f"{error}")
