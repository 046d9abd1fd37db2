"""Chain: an optimizer written as a list of transforms."""

from .chain import Chain as Chain  # a Chain that 0.1 pickled is looked for here
