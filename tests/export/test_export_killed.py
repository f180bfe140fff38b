"""An export that is killed leaves no bundle that opens, or a whole one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import traced

from knet_runtime.bundle.store import Bundle, open_bundle

# At a step of the export, copies of the process go on with it and are killed, each at its own
# moment. What the tracer gives was traced before.
_EXPORT_AND_KILL = """
import os, random, shutil, signal, sys, tempfile, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from knet_export.export import export_bundle
from knet_runtime.bundle.store import open_bundle
from knet_runtime.errors import BundleError
from traced import traced_before

checkpoint, destination, before = map(Path, sys.argv[1:])
moments = random.Random()
# Step: how many are killed there, and within how many seconds. Writing takes milliseconds.
plan = {"exporting": (2, 0.3), "running": (1, 0.3), "comparing": (1, 0.3), "writing": (6, 0.02)}
mine = os.getpid()

def state():
    if not destination.exists():
        return "absent"
    try:
        open_bundle(destination)
    except BundleError as error:
        return f"half: {error}"
    return "whole"

def on_step(step):
    if os.getpid() != mine:
        return
    times, longest = plan.get(step.split()[0], (0, 0))
    for _ in range(times):
        child = os.fork()
        if not child:
            # What the parent still needs must outlive a copy that gets through.
            tempfile.TemporaryDirectory.cleanup = lambda self: None
            return
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(step.split()[0], state(), flush=True)
        shutil.rmtree(destination, ignore_errors=True)

try:
    with traced_before(open_bundle(before)):
        export_bundle(checkpoint, destination, on_step=on_step)
finally:
    if os.getpid() != mine:
        os._exit(0)
"""


def test_an_export_killed_at_any_moment_leaves_no_half_bundle(
    checkpoint: Path, small_bundle: Bundle, tmp_path: Path
) -> None:
    destination = tmp_path / "out" / "killed.knet"
    orphan = destination.with_name(".killed.knet.0.work")
    in_use = destination.with_name(".killed.knet.1.work")
    for folder in (orphan, in_use):
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"left by an export")
    lock = os.open(in_use, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    words = [_EXPORT_AND_KILL, checkpoint, destination, small_bundle.path]
    path = [str(Path(traced.__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    os.close(lock)
    assert done.returncode == 0, done.stderr
    kills = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert Counter(step for step, _ in kills) == {
        "exporting": 2,
        "running": 1,
        "comparing": 1,
        "writing": 6,
    }
    assert {state for _, state in kills} <= {"absent", "whole"}, kills
    assert "absent" in {state for _, state in kills}, "nothing was killed in time"
    assert open_bundle(destination).graph("logits").parity  # the one that was left alone
    visible = [path.name for path in destination.parent.iterdir() if path.name[0] != "."]
    assert visible == ["killed.knet"]
    assert not orphan.exists(), "what a killed export left goes with the next one"
    assert (in_use / "weights.bin").exists(), "another export still needs it"
