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
    └── ParityError          an artefact does not agree with its reference

The text of each says what to do. Libraries raise; only the command line prints.
"""

from __future__ import annotations


class KnetError(Exception):
    """Base of all errors of this package; its text is one line that a user can act on."""


class BundleError(KnetError):
    """A bundle is missing, damaged, unsafe, or written by a newer version."""


class EngineError(KnetError):
    """An inference engine failed while it was loaded or run."""


class EngineUnavailable(EngineError):
    """An inference engine cannot run here; the text names what is missing."""


class SourceError(KnetError):
    """A video, image, folder or camera cannot be read."""


class OutputError(KnetError):
    """A result cannot be written where it was asked for."""


class OutputClosed(OutputError):
    """Whoever read a result has closed it: a reason to end the run, quietly."""


class DataError(KnetError):
    """Labelled data is missing, misshapen, or outside its label map."""


class ConfigError(KnetError):
    """A configuration has an unknown key, a wrong type, or contradicts itself."""


class CheckpointError(KnetError):
    """A checkpoint is missing, foreign, or does not fit the model."""


class TrainingError(KnetError):
    """A training run broke off in the middle; what it saved is whole."""


class ParityError(KnetError):
    """An artefact differs from its reference by more than its tolerance."""
