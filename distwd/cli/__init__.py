"""The command line: `python -m distwd plan | verify`. It may import everything, and nothing imports it."""
