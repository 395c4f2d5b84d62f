from __future__ import annotations

import os
import resource
import socket

from loramux.engine.background import wait_readable


def test_descriptors_beyond_1024_can_be_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    near, far = socket.socketpair()
    opened = [os.dup(near.fileno()) for _ in range(1100)]
    far.send(b"x")

    wait_readable(60, opened[0], opened[-1])

    assert max(opened) > 1024
    for descriptor in opened:
        os.close(descriptor)
    near.close()
    far.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
