# SPDX-License-Identifier: Apache-2.0
"""Who may write prepared weights: this user and root.

A digest finds damage, not malice: who writes an entry writes its digest too. So entries count only
if no other user could have written them.
"""

from __future__ import annotations

import os
import stat

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
FILE_MODE = stat.S_IRUSR
"""Of an entry, which is only ever replaced."""
DIRECTORY_MODE = stat.S_IRWXU


def fault_of(found: os.stat_result) -> str:
    """Why a directory or a file may have been written by another user; empty if it was not."""
    user = os.geteuid()
    if found.st_uid not in (user, 0):
        return f"belongs to user {found.st_uid}, expected user {user}"
    # The sticky bit of a directory like /tmp lets everybody add files.
    if found.st_mode & WRITABLE_BY_OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        return f"is writable by other users (mode {mode:o}), expected its owner only (chmod go-w)"
    return ""
