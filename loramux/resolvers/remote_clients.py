"""The clients of S3 and of the Hub; the libraries behind one are imported when it is first opened.

They are 0.2 s of a server's start, which most servers would spend for nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from loramux.resolvers.settings import SourceSettings

if TYPE_CHECKING:
    from loramux.resolvers.hub_client import HubClient
    from loramux.resolvers.s3_client import S3Client


def open_s3(settings: SourceSettings) -> S3Client:
    """A client of S3; may take some 0.2 s, once a process, so call it in a thread of its own."""
    return cast("S3Client", importlib.import_module("loramux.resolvers.s3_client").S3Client(settings))


def open_hub(settings: SourceSettings) -> HubClient:
    """A client of the Hugging Face Hub; as `open_s3`."""
    return cast("HubClient", importlib.import_module("loramux.resolvers.hub_client").HubClient(settings))
