"""Errors a user can cause, each one line that says what was wrong, where, and what to do."""

from __future__ import annotations


class LincompileError(ValueError):
    """Base of every error that lincompile raises for something outside its own code.

    The CLI prints the message as one line and exits with status 1.
    """


class ModelLoadError(LincompileError):
    """The model source can't be read: missing, truncated, of an unknown format, or not allowed to run."""


class CaptureError(LincompileError):
    """``torch.export`` can't trace the model, or the trace lost a dynamic axis."""


class RefusedError(LincompileError):
    """An explicit request can't be honoured soundly (for example: rewrite a site that isn't proved)."""


class PassError(LincompileError):
    """A pass failed or broke an op contract; the message names the pass and the node."""


class ArtefactError(LincompileError):
    """An artefact folder can't be written or opened: occupied, half-written, tampered with, or too new."""
