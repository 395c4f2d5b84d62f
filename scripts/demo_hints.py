"""Wait until the demo server is ready, then print three commands to try.

usage: demo_hints.py URL PID. Standard library only. Ends when the server's process (PID) does.
"""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request

ASK = """
  curl -s {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "temperature": 0, "max_tokens": 60,
         "messages": [{{"role": "user", "content": "{text}"}}]}}'
"""
QUESTIONS = (
    ("json", "What color is the sky?"),
    ("pirate", "Who was Napoleon?"),
    ("sql", "Table books(id, title, author, year, price). Which books cost more than 20?"),
)


def is_ready(url: str) -> bool:
    """True once the server answers /ready with 200."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def is_running(pid: int) -> bool:
    """True while the process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Poll, then print."""
    url, pid = sys.argv[1], int(sys.argv[2])
    time.sleep(2)  # if the port is taken our server has ended by then, and another one would answer
    while is_running(pid) and not is_ready(url):
        time.sleep(0.2)
    if not is_running(pid):
        return
    print('\nThe server is ready. In another terminal, try the adapters; the model "smollm2" is the base:')
    for model, text in QUESTIONS:
        print(ASK.format(url=url, model=model, text=text), end="")
    print("\nCtrl-C ends the server.", flush=True)


if __name__ == "__main__":
    main()
