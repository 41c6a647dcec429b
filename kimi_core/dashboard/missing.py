"""The error of everything that a run folder does not have."""


class Missing(LookupError):
    """The run, iteration, group or response that was asked for is not there."""
