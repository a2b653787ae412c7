"""The errors rayseg raises, each with the exit code its command ends with.

    RaysegError            1
    ├── ConfigError        2   an option, a region or a configuration that cannot be meant
    ├── DataError          3   imagery, labels or masks that cannot be used
    ├── RunIncomplete      3   the run ended, but some tiles failed or are missing
    │   ├── Stalled        3   nothing was finished for too long
    │   └── StoreFull      3   there is no room for results
    └── ModelError         4   weights, checkpoints or bundles that do not fit

A message is one sentence that names the thing, what was found, what was expected and what to do.
"""


class RaysegError(Exception):
    """Anything rayseg itself refuses; the command line prints its message without a traceback."""

    exit_code = 1


class ConfigError(RaysegError):
    """An option, a region or a configuration that cannot be meant."""

    exit_code = 2


class DataError(RaysegError):
    """Imagery, labels or masks that cannot be used."""

    exit_code = 3


class RunIncomplete(RaysegError):
    """The run ended, but some of its tiles failed or are missing."""

    exit_code = 3


class Stalled(RunIncomplete):
    """Nothing was finished for too long; something hangs, so the process cannot end by itself."""


class StoreFull(RunIncomplete):
    """There is no room for results where they go; nothing that was done is lost."""


class ModelError(RaysegError):
    """Weights, checkpoints or bundles that do not fit what is asked of them."""

    exit_code = 4
