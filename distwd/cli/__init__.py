"""The command line: `python -m distwd bench | plan | verify`. It may import everything, and nothing imports it."""
