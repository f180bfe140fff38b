"""Workers on Ray: on this machine alone, or on a cluster.

Ray is imported when a pool is made, and needs the extra ``ray``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from knet_runtime.batch.records import Job, Outcome, Settings
from knet_runtime.batch.worker import ChunkWorker
from knet_runtime.engines import engine_spec
from knet_runtime.errors import EngineError, first_line
from knet_runtime.types import Closeable

_READERS = 4  # files that are read at once
_LOCAL_STORE = 100 * 2**20  # bytes; what travels is small


class RayPool(Closeable):
    """A ``Pool`` of ``workers`` actors, each with one engine; a context manager.

    Ray is started when there is the first chunk to be done. Without an ``address`` that is on this
    machine, for this process alone. Its ports are on loopback, and ask for a token that is drawn
    here. With one ("auto", "HOST:PORT") the cluster's machines need this package, and the videos,
    the bundle and the output folder under the same paths. By default there is one worker per GPU,
    or per machine where the engine is a processor's.

    A call raises EngineError when Ray cannot be started or reached.
    """

    def __init__(
        self,
        settings: Settings,
        model: str,
        *,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._folder: str | None = None
        if address is None:
            # Ray reads these once, when it is imported.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        import ray
        import ray.data

        self._ray: Any = ray
        self._settings = settings
        self._model = model
        self._address = address
        self._wanted = workers
        self._workers = 0

    def _start(self) -> None:
        ray, handler = self._ray, signal.getsignal(signal.SIGTERM)
        try:
            if self._address is None:
                self._folder = tempfile.mkdtemp(prefix="knet-ray-")
                ray.init(
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=_LOCAL_STORE,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=self._folder,
                )
            else:
                ray.init(self._address, log_to_driver=False, logging_level=logging.ERROR)
            self._share()
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                where = "on this machine" if self._address is None else f"at {self._address}"
                raise EngineError(f"Ray cannot be used {where}: {first_line(error)}") from error
            raise
        finally:
            with contextlib.suppress(ValueError):  # of a thread that has no signals
                signal.signal(signal.SIGTERM, handler)  # Ray's own would end with another code

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """Do the jobs; outcomes come as they are ready. Ray does a job again whose worker died."""
        if self._address is None and all(job.chunk is None for job in jobs):
            # To cut is to read: threads here have done it before a worker has started.
            with ThreadPoolExecutor(_READERS) as threads:
                yield from threads.map(ChunkWorker(self._settings, self._model), jobs)
            return
        if not self._workers:
            self._start()
        data = self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # one part that kills its worker stops no other
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        rows = [{"job": pickle.dumps(job)} for job in jobs]
        mapped = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            RayWorker,
            fn_constructor_args=(self._settings, self._model),
            compute=data.ActorPoolStrategy(size=min(self._workers, len(rows))),
            batch_size=1,
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        for row in mapped.iter_rows():
            yield pickle.loads(row["outcome"])

    def close(self) -> None:
        """Stop what was started here."""
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _share(self) -> None:
        """How many workers there are, and what each may use."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
        engine = self._settings.engine
        on_cpu = engine != "auto" and engine_spec(engine).device == "cpu"
        gpus = 0.0 if on_cpu else sum(node.get("GPU", 0) for node in nodes)
        self._workers = self._wanted or int(gpus) or len(nodes)
        each = -(-self._workers // len(nodes))
        self._cpus: float = min(node["CPU"] for node in nodes) / each  # so that all of them fit
        self._gpus = min(1.0, gpus / self._workers)


class RayWorker:
    """A ``ChunkWorker`` as Ray Data calls it: batches of one row, pickled in and out."""

    def __init__(self, settings: Settings, model: str) -> None:
        self._worker = ChunkWorker(settings, model)

    def __call__(self, batch: dict[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self._worker(pickle.loads(job))) for job in batch["job"]]}
