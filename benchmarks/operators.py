"""Where an engine's time goes, operator by operator, by the engine's own profiler.

    python benchmarks/operators.py fp32.knet bf16.knet int8.knet \\
        --output benchmarks/results/operators.json

ONNX Runtime and OpenVINO, with the settings of the runtime's engines; a bundle that an engine does
not run is left out. Profiling costs a little, so the sum is above what `bench` measures.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino
from numpy.typing import NDArray
from result import parser_of, write_result

from knet_deploy.bench.benchmark import street_frames
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines.onnxruntime import session_options
from knet_runtime.engines.openvino import settings_of

WARM_UP, RUNS = 5, 20
ENGINES = {"fp32": "openvino", "int8": "openvino", "bf16": "openvino-bf16"}


def onnxruntime_times(bundle: Bundle, batch: NDArray[np.uint8]) -> dict[str, float]:
    """Milliseconds of each type of operator, the sum over its nodes of their medians."""
    options = session_options()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        graph = str(bundle.file(bundle.graph("logits").path))
        session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + RUNS):
            session.run(None, {bundle.manifest.input.name: batch})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    return _by_type((kind, median(times[WARM_UP:])) for (kind, _), times in nodes.items())


def openvino_times(
    core: Any, bundle: Bundle, batch: NDArray[np.uint8], engine: str
) -> dict[str, float]:
    """The same, by the kernel that OpenVINO took."""
    settings = {**settings_of(engine), "PERF_COUNT": True}
    model = core.read_model(bundle.file(bundle.graph("logits").path))
    model.reshape({0: list(batch.shape)})
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    nodes = defaultdict(list)
    for number in range(WARM_UP + RUNS):
        request.infer({0: batch})
        for item in request.get_profiling_info() if number >= WARM_UP else ():
            kind = f"{item.node_type} {item.exec_type}"
            nodes[kind, item.node_name].append(1000 * item.real_time.total_seconds())
    return _by_type((kind, median(times)) for (kind, _), times in nodes.items())


def _by_type(nodes: Any) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for kind, time in nodes:
        sums[kind] += time
    longest = sorted(sums.items(), key=lambda item: -item[1])
    return {kind: round(time, 3) for kind, time in longest if time >= 0.05}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    options = parser.parse_args()
    rows, core = [], openvino.Core()
    for path in options.bundles:
        bundle = open_bundle(path)
        precision, spec = bundle.manifest.precision, bundle.manifest.input
        batch = np.stack(street_frames((spec.height, spec.width), 1))
        row = {"bundle": bundle.model_id, "precision": precision}
        if precision != "bf16":  # it has no bf16 convolution
            times = onnxruntime_times(bundle, batch)
            rows.append({**row, "engine": "onnxruntime-cpu", "ms": times})
        engine = ENGINES[precision]
        times = openvino_times(core, bundle, batch, engine)
        rows.append({**row, "engine": engine, "ms": times})
    report = {"what": "milliseconds an image by operator, above 0.05", "rows": rows}
    write_result(report, options.output)


if __name__ == "__main__":
    main()
