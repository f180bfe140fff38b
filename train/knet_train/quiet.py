"""Lightning's advice, silenced where it does not apply to our runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Each is the start of a message (a regular expression), and the reason why it is no news here.
_NO_NEWS = (
    r".*treespec, LeafSpec",  # Lightning's own use of a deprecated torch function
    r".*does not have many workers",  # trainer.workers is the user's choice
    r".*number of training batches .* is smaller than the logging interval",  # short runs
    r".*resuming from a checkpoint that ended before the epoch ended",  # ours go on at the step
    r".*callbacks used to create the checkpoint need to be provided",  # progress bars come and go
    r".*callback states in the checkpoint",
    r".*module\(s\) in eval mode at the start of training",  # frozen norms are
    r".*use of fork\(\) may lead to deadlocks",  # torch's own way of starting workers
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside the block Lightning neither logs what it found ("GPU available: …", tips) nor warns
    about the things above; every other warning is shown as before."""
    logs = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _NO_NEWS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
