"""`python -m distwd`: see `python -m distwd --help`."""

from .cli.main import main
from .cli.process import end_process

if __name__ == "__main__":
    end_process(main())
