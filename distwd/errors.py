"""The one error of the plan, and that of a rank which waited in vain."""

from __future__ import annotations


class PlanError(ValueError):
    """The ranks do not agree on who holds what; raised on every rank alike.

    The message names the parameters, the ranks and what to change. Nothing has been modified when it is raised.

    >>> from distwd import PlanError
    >>> issubclass(PlanError, ValueError)
    True
    """


class CollectiveError(RuntimeError):
    """A collective failed, since another rank died, raised, or did not take part; the backend's own error is its cause."""
