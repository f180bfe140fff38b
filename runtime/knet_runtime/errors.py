"""Every error that knet-deploy raises on purpose.

    KnetError
    ├── BundleError          a bundle is broken, foreign, or newer than this package
    ├── EngineError         an inference engine failed
    │   └── EngineUnavailable   it cannot run on this machine
    ├── SourceError          a video, image or camera cannot be read
    ├── OutputError          a result cannot be written
    │   └── OutputClosed         whoever read it has had enough
    ├── DataError            labelled data is missing or does not fit its label map
    ├── ConfigError          a configuration is misspelt or contradicts itself
    ├── CheckpointError      a training checkpoint cannot be used
    ├── TrainingError        a training run broke off
    └── ParityError          a graph does not agree with its reference

The text of each says what to do. Libraries raise; only the command line prints.
"""

from __future__ import annotations


class KnetError(Exception):
    """Base of all errors of this package; its text is one line that a user can act on.

    >>> from knet_deploy import KnetError, open_source
    >>> try:
    ...     open_source("gone.mp4")
    ... except KnetError as error:
    ...     print(error)
    gone.mp4: No such file or directory; check the name and its permissions
    """

    example = ""  # what a file should look like, in a few lines that the command line adds


class BundleError(KnetError):
    """A bundle is missing, damaged, unsafe, or written by a newer version.

    >>> from knet_deploy import open_bundle
    >>> open_bundle("photos")
    Traceback (most recent call last):
    knet_runtime.errors.BundleError: photos: this is no bundle, ...
    """


class EngineError(KnetError):
    """An inference engine failed while it was loaded or run.

    >>> from knet_deploy import Segmenter
    >>> Segmenter(engine="abacus")
    Traceback (most recent call last):
    knet_runtime.errors.EngineError: there is no engine 'abacus': ...
    """


class EngineUnavailable(EngineError):
    """An inference engine cannot run here; the text names what is missing.

    >>> from knet_deploy import Segmenter
    >>> Segmenter(engine="tensorrt")
    Traceback (most recent call last):
    knet_runtime.errors.EngineUnavailable: ...
    """


class SourceError(KnetError):
    """A video, image, folder or camera cannot be read.

    >>> from knet_deploy import open_source
    >>> open_source("gone.png")
    Traceback (most recent call last):
    knet_runtime.errors.SourceError: gone.png: ...
    """


class OutputError(KnetError):
    """A result cannot be written where it was asked for.

    >>> from knet_deploy import MaskFolder
    >>> MaskFolder("street.png")
    Traceback (most recent call last):
    knet_runtime.errors.OutputError: street.png: ...
    """


class OutputClosed(OutputError):
    """Whoever read a result has closed it: a reason to end the run, quietly.

    >>> import os
    >>> from knet_deploy import RawMasks, Segmenter, open_source
    >>> reading, writing = os.pipe()
    >>> sink = RawMasks(writing)
    >>> os.close(reading)
    >>> with open_source("street.png") as source, Segmenter() as segment:
    ...     frame = next(iter(source))
    ...     sink.write(frame, segment(frame.image))
    Traceback (most recent call last):
    knet_runtime.errors.OutputClosed: raw masks: nobody reads it any more
    >>> os.close(writing)
    """


class DataError(KnetError):
    """Labelled data is missing, misshapen, or outside its label map.

    >>> from pathlib import Path
    >>> from knet_deploy import export_bundle
    >>> export_bundle(Path("best.safetensors"), Path("x.knet"), data=Path("photos"))
    Traceback (most recent call last):
    knet_runtime.errors.DataError: photos...
    """


class ConfigError(KnetError):
    """A configuration has an unknown key, a wrong type, or contradicts itself.

    >>> from knet_deploy import Smoother
    >>> Smoother(strength=99)
    Traceback (most recent call last):
    knet_runtime.errors.ConfigError: smooth is 99; give frames, from 1 to 16
    """


class CheckpointError(KnetError):
    """A checkpoint is missing, foreign, or does not fit the model.

    >>> from knet_deploy import load_checkpoint
    >>> load_checkpoint("street.png")
    Traceback (most recent call last):
    knet_runtime.errors.CheckpointError: street.png is not a readable safetensors file ...
    """


class TrainingError(KnetError):
    """A training run broke off in the middle; what it saved is whole.

    >>> from knet_deploy import KnetError, TrainingError
    >>> issubclass(TrainingError, KnetError)
    True
    """


class ParityError(KnetError):
    """A graph differs from its reference by more than its tolerance.

    >>> from knet_deploy import KnetError, ParityError
    >>> issubclass(ParityError, KnetError)
    True
    """


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
