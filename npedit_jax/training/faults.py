"""Faults that end a run, told in one line."""


class RunFault(RuntimeError):
    """A run cannot go on for a reason that its user can mend; the message says what was found and what to do."""


class DataStall(RunFault):
    """No batch came in time; threads or processes of the data pipeline may hang for ever."""


class TooManySkipped(RunFault):
    """More updates were left out than the configured share; every host finds it at the same step."""
