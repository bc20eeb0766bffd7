"""The errors masksolve raises beside ValueError and TypeError."""


class InvalidMaskError(ValueError):
    """A mask breaks the N:M constraint; the message names the first bad group."""


class NotInstalledError(ImportError):
    """A library that an extra installs is missing; the message names both."""


class MethodNotInstalledError(NotInstalledError):
    """A method needs a library that is not installed; the message names the extra to install."""


class UnusableWeightError(Exception):
    """A weight is NaN, infinite or an integer beyond float64. Internal: who holds the whole array names the weight."""
