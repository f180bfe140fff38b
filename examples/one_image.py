#!/usr/bin/env python3
"""One picture: what is on it, and the picture under the classes' colours.

python3 one_image.py photo.jpg                            # the packaged model: classes
python3 one_image.py photo.jpg --bundle street-panoptic   # objects, too
python3 one_image.py photo.jpg --bundle my.knet -o seen.png
"""

import argparse
import sys

import cv2

from knet_deploy import KnetError, Segmenter


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("image")
    parser.add_argument("--bundle", help="a folder, or a packaged model's name")
    parser.add_argument("-o", "--output", default="overlay.png")
    options = parser.parse_args()
    with Segmenter(options.bundle) as segment:
        result = segment(options.image)
    for name, share in result.shares().items():
        if share:
            print(f"{name:<12} {share:6.1%} of the picture")
    for one in result.segments:  # instance and panoptic models
        if one.is_thing:
            left, top, right, bottom = one.box
            size = f"{right - left}×{bottom - top}"
            print(f"{one.label:<12} {one.score:.2f} at {left}, {top}: {size} pixels")
    if not cv2.imwrite(options.output, result.overlay()[..., ::-1]):  # OpenCV writes BGR
        sys.exit(f"{options.output} cannot be written: choose another place, or .png or .jpg")


if __name__ == "__main__":
    try:
        main()
    except KnetError as error:  # its text says what to do
        sys.exit(f"{error}")
