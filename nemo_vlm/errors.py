"""The one error type for a mistake of the user: printed as one line, without a traceback; exit code 2."""


class ConfigError(ValueError):
    """A setting, file or environment that cannot work; the message names it, its value and what would be right."""
