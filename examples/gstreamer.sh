#!/usr/bin/env bash
# GStreamer reads and writes, knet-deploy draws in between: frames go through two pipes.
#
#     examples/gstreamer.sh [OPTION OF knet-deploy run]...
#
# SOURCE and SINK are any elements of GStreamer, such as
#
#     SOURCE="v4l2src device=/dev/video0" SINK=autovideosink examples/gstreamer.sh --legend
#     SOURCE="filesrc location=drive.mp4 ! decodebin" examples/gstreamer.sh --bundle street.knet
#
# Rows of raw RGB have no padding where WIDTH is a multiple of 4.
set -euo pipefail

WIDTH=${WIDTH:-640} HEIGHT=${HEIGHT:-480} RATE=${RATE:-30}
SOURCE=${SOURCE:-videotestsrc num-buffers=90}
SINK=${SINK:-jpegenc ! avimux ! filesink location=overlay.avi}
KNET=${KNET:-knet-deploy}

# The options are several words each, on purpose without quotes.
# shellcheck disable=SC2086
gst-launch-1.0 -q $SOURCE ! videoconvert ! videoscale ! videorate \
    ! "video/x-raw,format=RGB,width=$WIDTH,height=$HEIGHT,framerate=$RATE/1" ! fdsink |
    $KNET run - --raw-input "${WIDTH}x$HEIGHT:RGB@$RATE" -o - --raw-output RGB "$@" |
    gst-launch-1.0 -q fdsrc fd=0 \
        ! rawvideoparse format=rgb width="$WIDTH" height="$HEIGHT" framerate="$RATE/1" \
        ! videoconvert ! $SINK
