"""Asks `/health` all the time and prints how long each answer took, in milliseconds, one a line.

A process of its own, so that the clock does not measure the load generator. Ends with its stdin.
"""

from __future__ import annotations

import http.client
import select
import sys
import time
from urllib.parse import urlsplit

_INTERVAL_S = 0.05


def main(url: str) -> None:
    """Ask until stdin ends."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=10)
    while not select.select([sys.stdin], [], [], _INTERVAL_S)[0]:
        began = time.perf_counter()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except (OSError, http.client.HTTPException):
            connection.close()
            status = 0
        print(f"{1000 * (time.perf_counter() - began):.2f} {status}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
