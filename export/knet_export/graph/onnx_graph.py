"""An ONNX graph while it is being worked on: its weights, any of its tensors, another set of nodes.

It runs in ONNX Runtime on the CPU, with the options of all our sessions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from knet_runtime.engines.onnxruntime import open_session, session_options

Feed = Mapping[str, NDArray[Any]]
"""The graph's inputs by name."""


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A model, and the folder that its external data, if any, lies in."""

    model: onnx.ModelProto
    folder: Path

    @classmethod
    def load(cls, path: Path) -> OnnxGraph:
        """Read an ONNX file, without its external data. Raises OSError."""
        return cls(onnx.load(path, load_external_data=False), path.parent)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """The nodes, in an order in which they can run."""
        nodes: Sequence[onnx.NodeProto] = self.model.graph.node
        return nodes

    def constants(self) -> dict[str, onnx.TensorProto]:
        """The weights and other constants by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def value(self, constant: onnx.TensorProto) -> NDArray[Any]:
        """A constant's value."""
        return numpy_helper.to_array(constant, str(self.folder))

    def session(self, taps: Iterable[str] = ()) -> Any:
        """An ONNX Runtime session; the tensors ``taps`` can be fetched from it besides the graph's
        outputs. Raises what ONNX Runtime raises."""
        model = self.model
        known = {output.name for output in model.graph.output}
        if added := [onnx.ValueInfoProto(name=name) for name in taps if name not in known]:
            model = onnx.ModelProto()
            model.CopyFrom(self.model)
            model.graph.output.extend(added)
        options = session_options()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.folder)
        )
        return open_session(model.SerializeToString(), options)

    def run(self, feed: Feed, names: Sequence[str]) -> list[NDArray[Any]]:
        """The tensors ``names``. Raises what ONNX Runtime raises."""
        results: list[NDArray[Any]] = self.session(names).run(list(names), dict(feed))
        return results

    def run_given(self, given: Feed, feed: Feed, names: Sequence[str]) -> list[NDArray[Any]]:
        """The tensors ``names`` when those of ``given`` are what they are there, and not what the
        graph would compute."""
        nodes, _ = self._rest(given.keys(), names)
        rest = self.rebuilt(nodes)
        read = {name for node in nodes for name in node.input}
        fed = {name: value for name, value in {**feed, **given}.items() if name in read}
        body = rest.model.graph
        types = {tensor.name: tensor for tensor in body.input}
        del body.input[:], body.output[:]
        for name, value in fed.items():
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            unknown = helper.make_tensor_value_info(name, kind, [None] * value.ndim)
            body.input.append(types.get(name, unknown))
        body.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return rest.run(fed, names)

    def needed(self, given: Collection[str], names: Iterable[str]) -> list[str]:
        """Those of the tensors ``given`` that ``names`` are computed from directly, with no other
        of them in between."""
        return self._rest(given, names)[1]

    def _rest(
        self, given: Collection[str], names: Iterable[str]
    ) -> tuple[list[onnx.NodeProto], list[str]]:
        """The nodes that ``names`` still need when the tensors ``given`` are there, and those of
        ``given`` that are read."""
        makers = {name: node for node in self.nodes for name in node.output}
        wanted, needed = list(names), set()
        fed: dict[str, None] = {}
        while wanted:
            name = wanted.pop()
            if name in given:
                fed[name] = None
            elif name in makers and makers[name].output[0] not in needed:
                needed.add(makers[name].output[0])
                wanted += makers[name].input
        return [node for node in self.nodes if node.output[0] in needed], list(fed)

    def rebuilt(
        self, nodes: Sequence[onnx.NodeProto], constants: Iterable[onnx.TensorProto] = ()
    ) -> OnnxGraph:
        """A copy with ``nodes`` in place of its own, and those of its own constants and of
        ``constants`` that they read."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        body = model.graph
        read = {name for node in nodes for name in node.input}
        for field in (body.node, body.initializer, body.value_info):
            del field[:]
        body.node.extend(nodes)
        own = self.model.graph.initializer
        body.initializer.extend(tensor for tensor in (*own, *constants) if tensor.name in read)
        return OnnxGraph(model, self.folder)

    def save(self, path: Path, data_name: str) -> None:
        """Write it to ``path``, with its external data beside it in ``data_name``. Raises
        OSError."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        onnx.load_external_data_for_model(model, str(self.folder))
        onnx.save(model, path, save_as_external_data=True, location=data_name, size_threshold=1024)
