"""The errors sfrt raises on purpose: one clear sentence each, saying what, where and what to do."""

from __future__ import annotations


class SfrtError(Exception):
    """Base of every error a user can cause or cure; the command line prints it and exits with 2."""


class ConfigError(SfrtError, ValueError):
    """A setting is impossible, alone or beside the others."""


class CheckpointError(SfrtError):
    """A published checkpoint cannot be read as the model it should be."""


class BundleError(SfrtError):
    """A bundle on disk is damaged, incomplete or of another version."""


class DeviceError(SfrtError):
    """The device asked for does not exist here or has too little memory."""


class MediaError(SfrtError):
    """A picture or video cannot be read or written."""


class PromptError(SfrtError, ValueError):
    """A prompt is empty or not text."""


class KernelInputError(SfrtError, ValueError):
    """A kernel was given tensors that it would read or write wrongly."""


class SnapshotError(SfrtError):
    """A stream's state cannot be kept, read, or gone on from."""


class Cancelled(SfrtError):
    """A chunk was given up because its session was told to; the stream stands where it stood before it."""


class ProtocolError(SfrtError):
    """A message over the wire is none that the other end understands."""


class AdmissionError(SfrtError):
    """A device has no time or memory for one more session."""
