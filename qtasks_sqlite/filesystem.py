"""Warning of a database on a network: its locks and shared memory work on one machine only."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger("qtasks.sqlite")

_NETWORK = frozenset({
    "9p", "afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs",
    "fuse.sshfs", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs",
})  # fmt: skip
_ESCAPED = re.compile(rb"\\([0-7]{3})")
"""The list of mounts escapes a space, a tab, a line end or a backslash like this."""
_warned: set[Path] = set()


def warn_of_network(path: Path, mounts: str = "/proc/mounts") -> None:
    """Warn once for each file on a network: SQLite cannot lock it between machines."""
    kind = kind_of(path, mounts)
    if kind in _NETWORK and path not in _warned:
        _warned.add(path)
        logger.warning(
            "%s is on a network file system (%s): processes on several machines would corrupt it, "
            "and on one it may still be slow or fail; put it on a local disk",
            path,
            kind,
        )


def kind_of(path: Path, mounts: str) -> str | None:
    """Return the type of the file system of a path, None if it is unknown."""
    best, kind = -1, None
    try:
        with open(mounts, "rb") as lines:
            for line in lines:
                _, point, found, *_ = line.split(b" ")
                name = os.fsdecode(_ESCAPED.sub(lambda octal: bytes([int(octal[1], 8)]), point))
                # If two mounts have one mount point, the later one hides the earlier one.
                if path.is_relative_to(name) and len(name) >= best:
                    best, kind = len(name), found.decode()
    except (OSError, ValueError):
        return None
    return kind
