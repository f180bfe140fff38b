#!/usr/bin/env python3
"""An engine of one's own: the bundle's graph on whatever accelerator ONNX Runtime has a provider
for, such as QNNExecutionProvider, CoreMLExecutionProvider or XnnpackExecutionProvider.

    python3 own_engine.py photo.jpg --provider XnnpackExecutionProvider

Not run on such an accelerator so far: the tests run it on CPUExecutionProvider. The same class
with another ``infer`` serves an SDK that has nothing to do with ONNX Runtime. What the bundle
carries as proof, images and the logits that PyTorch gave for them, decides whether to trust it.
"""

import argparse
import sys

import onnxruntime

from knet_deploy import EngineError, KnetError, Segmenter, open_bundle


class ProviderEngine:
    """What ``knet_runtime.engines.Engine`` describes, over a session of ONNX Runtime."""

    kind = "logits"  # which of the bundle's graphs it runs

    def __init__(self, bundle, provider, **options):
        graph = bundle.graph(self.kind)
        self.name = f"own-{provider}"
        self.device = provider
        self.outputs = [output.name for output in graph.outputs]
        self.input = bundle.manifest.input.name
        try:
            self.session = onnxruntime.InferenceSession(
                bundle.file(graph.path), providers=[(provider, options)]
            )
        except Exception as error:
            raise EngineError(f"{provider}: {error}") from error
        # ONNX Runtime falls back to the processor without an error: that is not what was asked for.
        if provider not in self.session.get_providers():
            raise EngineError(
                f"{provider} is not in this ONNX Runtime: install the package of its maker, which "
                f"has one of {', '.join(onnxruntime.get_available_providers())} now"
            )

    def infer(self, batch):
        """uint8 [B, H, W, 3] RGB at the model's size, to the graph's outputs by name."""
        arrays = self.session.run(self.outputs, {self.input: batch})
        return dict(zip(self.outputs, arrays, strict=True))

    def close(self):
        self.session = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("image")
    parser.add_argument("--provider", default="CPUExecutionProvider")
    parser.add_argument("--bundle")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    with Segmenter(bundle, ProviderEngine(bundle, options.provider)) as segment:
        test = segment.self_test()  # ParityError when it gives other results than PyTorch gave
        print(f"{segment.engine}: {test.detail if test else 'this bundle holds no proof'}")
        print(segment(options.image))


if __name__ == "__main__":
    try:
        main()
    except KnetError as error:  # its text says what to do
        sys.exit(f"{error}")
