"""The errors a user can meet: each names the value, the limit and the remedy."""


class PensarError(Exception):
    """Any failure that is explained to the user without a traceback (exit code 1)."""


class ConfigError(PensarError, ValueError):
    """A recipe, flag or argument that cannot be used as it stands (exit code 2)."""


class DataError(PensarError, ValueError):
    """A file or record whose content cannot be used."""


class ModelError(PensarError, ValueError):
    """A model directory that cannot be opened, or a request it cannot serve."""


class RunError(PensarError, RuntimeError):
    """A run that cannot go on: locked folder, vanished input, full disk."""
