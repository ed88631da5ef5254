"""What every command of the project shares with the person before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm.auto import tqdm


class UserError(Exception):
    """A mistake the user can mend: the message says what is wrong, where, and what to do."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command line: exit 2 with one message for a user's mistake, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted. {error}".removesuffix(". "), file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def progress(**options: Any) -> tqdm:
    """A progress bar that redraws itself in a terminal or notebook, and seldom writes into a log.

    TQDM_DISABLE=1 in the environment turns it off.
    """
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    options["mininterval"] = 0.2 if live else 15
    if os.environ.get("TQDM_DISABLE"):  # which tqdm overlooks in notebooks
        options["disable"] = True
    return tqdm(**options)
