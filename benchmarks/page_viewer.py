"""Viewers of the live page for page_viewers.py: they take every frame, and count.

python page_viewer.py PORT COUNT: until stdin ends; then bytes and frames of all go to stdout.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading


def view(port: int, seen: list[int]) -> None:
    """Take what /live sends, as knet_runtime/web/streams.py describes it."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/live")
    answer = connection.getresponse()
    while size := answer.read(4):
        head = json.loads(answer.read(int.from_bytes(size, "little")))
        seen[0] += len(answer.read(head["jpeg"] + 6 * head["runs"]))
        seen[1] += 1


def main() -> None:
    port, count = int(sys.argv[1]), int(sys.argv[2])
    seen = [[0, 0] for _ in range(count)]
    for mine in seen:
        threading.Thread(target=view, args=(port, mine), daemon=True).start()
    sys.stdin.read()
    sys.stdout.write(json.dumps([sum(column) for column in zip(*seen, strict=True)]))
    sys.stdout.flush()
    os._exit(0)  # the threads are waiting for the next frame


if __name__ == "__main__":
    main()
