#!/usr/bin/env python3
"""A sink of one's own: it says when a class enters an area of the image, and when it has left.

    python3 own_sink.py drive.mp4 --class Pedestrian --area 0.25,0.5,0.75,1
    python3 own_sink.py camera:0 --class Car --share 0.2

A sink is anything with ``name``, ``path``, ``write`` and ``close``. The pipeline calls it from a
thread of its own for each source, in the frames' order, while the next frames are segmented.
"""

import argparse
import sys
import threading

from knet_deploy import Feed, KnetError, Pipeline, Segmenter, open_source


class Alarm:
    """Prints a line when ``name`` covers more than ``share`` of the area, and when no longer.

    The area is (left, top, right, bottom) in shares of the image. So that a flicker is no alarm,
    ``patience`` frames in a row have to agree.
    """

    path = None  # it writes no file

    def __init__(self, labels, wanted, area, share, patience=3):
        self.name = f"alarm {wanted}"
        self.wanted, self.index = wanted, labels.names.index(wanted)
        self.area, self.share, self.patience = area, share, patience
        self.raised, self.agreeing = False, 0

    def write(self, frame, result):
        height, width = result.class_map.shape
        left, top, right, bottom = self.area
        part = result.class_map[
            round(top * height) : round(bottom * height), round(left * width) : round(right * width)
        ]
        seen = (part == self.index).mean() > self.share
        self.agreeing = self.agreeing + 1 if seen != self.raised else 0
        if self.agreeing == self.patience:
            self.raised, self.agreeing = not self.raised, 0
            at = f"{float(frame.pts):.2f} s" if frame.pts is not None else f"frame {frame.index}"
            print(f"{at}: {self.wanted} {'in' if self.raised else 'out of'} the area", flush=True)

    def close(self, *, complete=True):
        if not complete:  # the run broke off: nobody watches any more
            print("not watching", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="whatever knet-deploy run takes")
    parser.add_argument("--class", dest="wanted", default="Pedestrian")
    parser.add_argument("--area", default="0,0,1,1", help="left,top,right,bottom: 0 … 1")
    parser.add_argument("--share", type=float, default=0.01, help="of the area: 0 … 1")
    parser.add_argument("--bundle")
    options = parser.parse_args()
    area = [float(side) for side in options.area.split(",")]
    stop = threading.Event()  # set it from anywhere to end the run with all outputs whole
    with Segmenter(options.bundle) as segment, open_source(options.source) as source:
        segment.self_test()
        if options.wanted not in segment.labels.names:
            sys.exit(f"no class {options.wanted!r}: choose of {', '.join(segment.labels.names)}")
        alarm = Alarm(segment.labels, options.wanted, area, options.share)
        with Pipeline([Feed(source, [alarm])], segment) as pipeline:
            summary = pipeline.join(stop)
    print(f"{summary.frames} frames, {summary.fps:.1f} a second")


if __name__ == "__main__":
    try:
        main()
    except KnetError as error:  # its text says what to do
        sys.exit(f"{error}")
