"""Errors that a person can act on.

Every error edgejax raises on purpose is an ``EdgejaxError``. Its message says what was wrong, with the
values, and what to do next. The command line prints it without a traceback and exits with ``exit_code``.
"""


class EdgejaxError(Exception):
    """Base of all errors raised on purpose; the command line exits with ``exit_code``."""

    exit_code = 2


class ConfigError(EdgejaxError, ValueError):
    """An option, or a combination of options, that cannot be honoured."""


class WeightsError(EdgejaxError, ValueError):
    """A weight file that is missing, damaged, or holds something unsupported."""


class DataError(EdgejaxError, ValueError):
    """Training or evaluation text that cannot be used; names the file and line where it can."""


class RunError(EdgejaxError, RuntimeError):
    """A run that cannot start, go on, or be resumed; what was saved before stays."""


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 3


class Interrupted(EdgejaxError):
    """SIGINT or SIGTERM arrived; what there was to save was saved. ``exit_code`` is 128 + the signal's number.

    Attributes:
      resumable: whether a run had begun, so that there is one to go on with.
    """

    def __init__(self, message: str, signal_number: int, *, resumable: bool = True):
        super().__init__(message)
        self.exit_code = 128 + signal_number
        self.resumable = resumable
