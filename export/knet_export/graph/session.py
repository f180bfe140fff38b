"""An ONNX graph in memory, run on the CPU while it is being worked on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from knet_runtime.backends.machine import cpu_budget


def open_session(graph: onnx.ModelProto, folder: Path, taps: Sequence[str] = ()) -> Any:
    """An ONNX Runtime session of ``graph``, whose external data, if any, lies in ``folder``; the
    tensors ``taps`` can be fetched from it besides the graph's outputs."""
    if taps:
        tapped = onnx.ModelProto()
        tapped.CopyFrom(graph)
        known = {output.name for output in graph.graph.output}
        tapped.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in taps if name not in known
        )
        graph = tapped
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = cpu_budget()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
