"""The batch on a real Ray of this machine: the same bytes, also when a worker is killed.

Ray listens on all interfaces, so all of this runs in one process without a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knet_runtime.batch.records import Settings

pytest.importorskip("ray", reason="Ray is not installed: pip install knet-deploy[ray]")

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGES = os.pathsep.join(str(REPOSITORY / name) for name in ("knet_deploy", "runtime"))
SCRIPT = Path(__file__).with_name("on_ray.py")


@pytest.fixture
def without_network() -> list[str]:
    """What a command begins with to have a loopback and no other interface."""
    isolated = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"']
    probe = [*isolated, "sh", "true"]
    try:
        subprocess.run(probe, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a namespace without a network is not permitted here, and Ray listens on all")
    return [*isolated, "sh"]


def test_ray_gives_the_bytes_of_a_single_run_though_a_worker_is_killed(
    without_network: list[str],
    video: Callable[[str], Path],
    settings: Settings,
    single: Callable[[Path], dict[str, bytes]],
    written: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    path = video("b-frames.mp4")
    out = tmp_path / "out"
    command = [*without_network, sys.executable, str(SCRIPT), settings.bundle, str(out)]
    done = subprocess.run(
        [*command, str(path), str(text)],
        env={**os.environ, "PYTHONPATH": PACKAGES, "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["killed"], report  # it was killed while it worked
    assert report["code"] == 1  # one video failed, by name
    results = json.loads((out / "results.json").read_bytes())
    assert list(results["failures"]) == [str(text)]
    assert f"knet-deploy: error: {text}: is not a video" in done.stderr
    assert report["outside"] == []  # nothing but loopback is there to listen on
    assert report["left"] == []  # no folder of Ray's
    (folder,) = (one["folder"] for one in results["sources"] if one["source"] == str(path))
    assert written(out / folder) == single(path)
    assert not (out / ".work").exists()
