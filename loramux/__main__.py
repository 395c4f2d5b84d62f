"""`python -m loramux` is the `loramux` command."""

from loramux.server.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
