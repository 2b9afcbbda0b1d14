"""A full disk: recognised by its error numbers, and said in one line that says what to do.

It is the user's to mend (status 78), and the same command then goes on: what a failed piece of work half wrote is
removed, finished pieces and stages stay, and nothing half is ever published.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.settings import BadInputError


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` means that there is no room left, or none that this user may have."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def said_in_one_line(path: Path) -> Iterator[None]:
    """Turn a full disk in the body, which writes below ``path``, into a ``BadInputError``; other errors pass."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise unwritable(path, error) from None
        raise


def unwritable(path: Path, error: OSError) -> BadInputError:
    """The line for a full disk and its like."""
    return BadInputError(
        f"{path}: cannot be written ({error.strerror}); make room or choose another output, then run it again: "
        "finished stages are kept, and nothing half is published"
    )
