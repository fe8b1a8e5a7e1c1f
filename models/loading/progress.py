"""A progress bar that counts bytes."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def byte_progress(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr while the context is open.

    Args:
      total: Bytes of all arrays.
      shown: Whether to show anything.

    Yields:
      A function that adds a number of bytes to the bytes loaded so far.
    """
    if not shown:
        yield lambda count: None
        return
    columns = (
        TextColumn("Loading weights"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
