"""ONNX Runtime on a GPU through buffers that stay where they are, so that a CUDA graph can be used.

Checked on the CPU's memory, and never run on a GPU by its authors.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


class _Bound(NamedTuple):
    image: Any
    output: Any
    binding: Any
    options: Any


class BoundSession:
    """Runs ``session`` with an input and an output buffer per batch size, made at its first batch.

    ``input_name`` is uint8, ``output_name`` has ``element`` and, for one picture, ``output_shape``.
    With ``graphs`` each size is a CUDA graph of its own, which the provider captures at its first
    run. Calls from several threads take turns.
    """

    def __init__(
        self,
        session: Any,
        input_name: str,
        output_name: str,
        output_shape: tuple[int, ...],
        element: type[np.float32] | type[np.uint8],
        *,
        graphs: bool,
        device: str = "cuda",
    ) -> None:
        self._session = session
        self._names = input_name, output_name
        self._shape, self._element = output_shape, element
        self._graphs = graphs
        self._device = device
        self._lock = threading.Lock()
        self._bound: dict[int, _Bound] = {}

    def run(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """uint8 [B, H, W, 3] to a new array [B, …] of the output; raises what ONNX Runtime does."""
        with self._lock:
            bound = self._bound.get(len(images))
            if bound is None:
                bound = self._bound[len(images)] = self._bind(images.shape)
            bound.image.update_inplace(np.ascontiguousarray(images))
            self._session.run_with_iobinding(bound.binding, bound.options)
            return np.array(bound.output.numpy())

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        make = ort.OrtValue.ortvalue_from_shape_and_type
        image = make(list(shape), np.uint8, self._device, 0)
        output = make([shape[0], *self._shape], self._element, self._device, 0)
        binding, options = self._session.io_binding(), ort.RunOptions()
        binding.bind_ortvalue_input(self._names[0], image)
        binding.bind_ortvalue_output(self._names[1], output)
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(shape[0]))
        return _Bound(image, output, binding, options)
