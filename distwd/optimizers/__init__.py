"""torch optimizers as transforms of a chain, and how each kind of them is run."""
