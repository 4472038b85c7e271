"""Progress on stderr: a bar for the generation under way, a line for each that is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def note(message: str) -> None:
    """A line on stderr, above the bar if there is one."""
    tqdm.write(message, file=sys.stderr)


@contextmanager
def steps_bar(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to be told the number of finished steps."""
    with tqdm(total=steps, desc=label, file=sys.stderr, unit="step", leave=False, dynamic_ncols=True) as bar:

        def finished(done: int) -> None:
            bar.update(done - bar.n)

        yield finished
