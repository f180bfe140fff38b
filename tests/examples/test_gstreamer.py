"""examples/gstreamer.sh as it stands."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from knet_runtime.bundle.store import Bundle

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gstreamer.sh"


@pytest.mark.skipif(
    shutil.which("gst-launch-1.0") is None,
    reason="needs Debian's gstreamer1.0-tools and gstreamer1.0-plugins-base, -good",
)
def test_what_gstreamer_reads_comes_out_overlaid(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    environment = {
        **os.environ,
        **{"WIDTH": "64", "HEIGHT": "48", "RATE": "10"},
        "SOURCE": "videotestsrc num-buffers=12 pattern=red ! video/x-raw,framerate=10/1",
        "KNET": f"{shlex.quote(sys.executable)} -m knet_deploy",
    }
    words = ["--alpha", "1", "--bundle", str(make_bundle().path), "--self-test", "off"]
    done = subprocess.run(
        [EXAMPLE, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with av.open(str(tmp_path / "overlay.avi")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 12
    assert abs(frames[-1].astype(int) - [255, 0, 0]).max() < 30  # the colour of the class "red"
