"""The exceptions that a user may see: each says what was wrong, where, and what to do.

The command line prints such an error as one line and exits with `exit_code`; anything else is a bug and
keeps its stack trace.
"""

import errno
import os


class SimaError(ValueError):
    """Base of every error that is the input's or the environment's, not the code's."""

    exit_code = 1


class ConfigError(SimaError):
    """A run config that cannot be read or does not fit."""

    exit_code = 2


class DataError(SimaError):
    """A prompts file, image, annotation or pairs file that cannot be used at all."""


class ModelError(SimaError):
    """A model folder that is missing, incomplete or of an unknown layout."""


class ParityError(ModelError):
    """A merged model that does not compute what base + adapter compute; it is not published."""


class ServiceError(SimaError):
    """The policy or critic service is unreachable, overloaded beyond the retries, or failed."""


class RequestRefused(ServiceError):
    """A request that can never succeed (too long, a broken image); the message says why."""


class ClusterError(SimaError):
    """A Ray cluster that cannot be reached or cannot satisfy the request."""


class JobFailed(SimaError):
    """A submitted job that did not succeed."""


class LedgerError(SimaError):
    """A run whose rows do not add up: read != pairs + counted reasons + quarantined."""


class TrainingError(SimaError):
    """A tuning run that must not go on: a loss that is not finite, a pair without response tokens, …"""


def last_line(error: BaseException) -> str:
    """The last line of an error, which is the cause where errors are wrapped, as Ray's are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def one_line(error: object, limit: int = 300) -> str:
    """An error's text on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def why(error: BaseException) -> str:
    """Why a file cannot be used, on one line, for a message that names the file.

    The operating system's words alone, where they are known: pyarrow's own name the file and the cause twice.
    """
    if isinstance(error, FileNotFoundError):  # pyarrow raises some without a number
        return os.strerror(errno.ENOENT)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return one_line(error)
