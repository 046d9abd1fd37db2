"""The two errors of distwd's own: ranks that do not agree about the model, and a collective that failed."""

from __future__ import annotations


class PlanError(ValueError):
    """The ranks do not agree on who holds what. It is raised on every rank.

    The message names the parameters, the ranks and what to change. Nothing has been modified when it is raised.

    >>> from distwd import PlanError
    >>> issubclass(PlanError, ValueError)
    True
    """


class CollectiveError(RuntimeError):
    """A collective failed because another rank died, raised, or did not take part. Its cause is the backend's own error."""
