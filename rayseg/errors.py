"""The errors that rayseg raises, each with the exit code of the command that it ends.

    RaysegError            1
    ├── ConfigError        2   an invalid option, region or configuration
    │   └── StoreRefused   2   the object store refuses the keys in use, or the clock
    ├── DataError          3   unusable imagery, labels or masks
    ├── RunIncomplete      3   the run ended, but some tiles failed or are missing
    │   ├── Stalled        3   no progress for too long
    │   └── StoreFull      3   no space for results
    ├── ModelError         4   weights, checkpoints or bundles that do not fit
    └── RequirementNotMet  5   the run is finished, but misses what --require asks for

A message is one clause with four parts: the thing, what was found, what was expected, what to do. It begins in lower
case, has a semicolon before what to do, and no full stop, so that it can stand inside another message.
"""

from collections.abc import Collection


class RaysegError(Exception):
    """An error that rayseg detects itself; the command line prints its message without a traceback."""

    exit_code = 1


class ConfigError(RaysegError):
    """An invalid option, region or configuration."""

    exit_code = 2


class StoreRefused(ConfigError, PermissionError):
    """The object store refuses all requests with the keys in use; finished results are kept."""


class DataError(RaysegError):
    """Unusable imagery, labels or masks."""

    exit_code = 3


class RunIncomplete(RaysegError):
    """The run ended, but some of its tiles failed or are missing."""

    exit_code = 3


class Stalled(RunIncomplete):
    """No progress for too long; a thread hangs, so the process cannot end by itself."""


class StoreFull(RunIncomplete):
    """No space for results on their disk; finished results are kept."""


class ModelError(RaysegError):
    """Weights, checkpoints or bundles that do not fit their use."""

    exit_code = 4


class RequirementNotMet(RaysegError):
    """A finished run misses a limit that the command was given for it."""

    exit_code = 5


def listed(names: Collection[object], *, most: int = 5, separator: str = ", ") -> str:
    """The first names for a message, and the number of the others: `a, b and 3 more`."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(str(name) for _, name in zip(range(most), names, strict=False)) + rest
