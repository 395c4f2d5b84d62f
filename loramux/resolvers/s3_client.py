"""The three S3 calls that are needed, on an `s3fs` filesystem set up by the operator alone.

`s3fs` runs its connections in a loop thread of its own; here everything blocks. Retries are ours, since
only we know how far a download came.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError

from loramux.engine.errors import AdapterNotFound, AdapterSourceAuth, AdapterUnavailable, LoramuxError
from loramux.resolvers.io_loop import IoCalls
from loramux.resolvers.listing import Hiccup, SourceChanged
from loramux.resolvers.settings import SourceSettings

_READ_BYTES: Final = 1 << 20
_MAX_PAGES: Final = 100
_AUTH_CODES: Final = frozenset(
    {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
)
_CHANGED_STATUSES: Final = frozenset({412, 416})
_SDK_ERRORS: Final = (OSError, BotoCoreError, aiohttp.ClientError, asyncio.TimeoutError)


class ObjectState(NamedTuple):
    """One object as it is now."""

    key: str
    size: int
    etag: str  # with its quotes, as If-Match wants it
    md5: str | None  # when the ETag is one: not of multipart uploads, nor of some encryptions


class S3Client:
    """Blocking; safe to use from several threads."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._calls = IoCalls()
        self._opening = threading.Lock()
        self._opened: Any = None

    def close(self) -> None:
        """Give up every call and close every connection."""
        with self._opening:
            fs, self._opened = self._opened, None
        is_connected = fs is not None and fs._s3creator is not None
        self._calls.close(fs._s3creator.__aexit__(None, None, None) if is_connected else None)

    def names(self, bucket: str, prefix: str) -> list[str]:
        """What lies directly under `prefix`, which ends in / or is empty; folders are left out.

        Raises:
            Hiccup: S3 is down, slow or asks to come back later.
            AdapterNotFound: there is no such bucket.
            AdapterSourceAuth: the credentials are missing or refused.
        """
        found: list[str] = []
        more: dict[str, str] = {}
        for _ in range(_MAX_PAGES):
            page = self._call(
                "list_objects_v2",
                f"s3://{bucket}/{prefix}",
                Bucket=bucket,
                Prefix=prefix,
                Delimiter="/",
                **more,
            )
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            found += [key[len(prefix) :] for key in keys if key.startswith(prefix) and key != prefix]
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}
        raise AdapterUnavailable(f"s3://{bucket}/{prefix} has too many objects to list", param="lora_path")

    def state(self, bucket: str, key: str) -> ObjectState:
        """Size and ETag of one object; raises like `names`, and AdapterNotFound if it does not exist."""
        head = self._call("head_object", f"s3://{bucket}/{key}", Bucket=bucket, Key=key)
        etag = str(head["ETag"])
        bare = etag.strip('"')
        is_md5 = len(bare) == 32 and head.get("ServerSideEncryption", "AES256") == "AES256"
        is_md5 = is_md5 and "SSECustomerAlgorithm" not in head
        return ObjectState(key, int(head["ContentLength"]), etag, bare if is_md5 else None)

    def read(self, bucket: str, key: str, etag: str, start: int) -> Iterator[bytes]:
        """The bytes of an object from `start` on.

        Raises:
            SourceChanged: the object's ETag is another now.
            Hiccup, AdapterNotFound, AdapterSourceAuth: as `names`.
        """
        place = f"s3://{bucket}/{key}"
        byte_range = {"Range": f"bytes={start}-"} if start else {}
        answer = self._call("get_object", place, Bucket=bucket, Key=key, IfMatch=etag, **byte_range)
        body = answer["Body"]
        try:
            while chunk := self._calls.run(_read(body, place)):
                yield chunk
        finally:
            with suppress(AdapterUnavailable):  # closed meanwhile, and the connection with it
                self._calls.run(_close(body))

    def _call(self, method: str, place: str, **arguments: Any) -> Any:
        return self._calls.run(_call(self._filesystem(), method, place, arguments))

    def _filesystem(self) -> Any:
        with self._opening:
            if self._opened is None:
                self._opened = _open(self._settings)
            return self._opened


def _open(settings: SourceSettings) -> Any:
    fs = s3fs.S3FileSystem(
        anon=settings.s3_anonymous,
        key=settings.s3_access_key_id,
        secret=settings.s3_secret_access_key,
        token=settings.s3_session_token,
        endpoint_url=settings.s3_endpoint,
        client_kwargs={"region_name": settings.s3_region} if settings.s3_region else {},
        config_kwargs={
            "connect_timeout": settings.connect_timeout_s,
            "read_timeout": settings.stall_timeout_s,
            "retries": {"total_max_attempts": 1},
            "s3": {"addressing_style": settings.s3_addressing_style},
        },
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    fs.retries = 1
    return fs


async def _call(fs: Any, method: str, place: str, arguments: dict[str, Any]) -> Any:
    with _translated(place):
        return await fs._call_s3(method, **arguments)


async def _close(body: Any) -> None:
    body.close()


async def _read(body: Any, place: str) -> bytes:
    with _translated(place):
        return bytes(await body.read(_READ_BYTES))


@contextmanager
def _translated(place: str) -> Iterator[None]:
    """Turn every error of the SDK into one that says what to do next."""
    try:
        yield
    except (NoCredentialsError, CredentialRetrievalError) as error:
        raise AdapterSourceAuth(
            f"{place}: this server has no credentials for S3 ({error}); LORAMUX_S3_ANONYMOUS=1 reads a public"
            " bucket",
            param="lora_path",
        ) from error
    except _SDK_ERRORS as error:
        answer = error.__cause__ if isinstance(error.__cause__, ClientError) else None
        if answer is None:
            raise Hiccup(f"the connection to S3 failed: {error or type(error).__name__}") from error
        raise _meaning(answer, place) from error
    except ClientError as error:
        raise _meaning(error, place) from error


def _meaning(error: ClientError, place: str) -> LoramuxError | Hiccup | SourceChanged:
    """What an answer of S3 other than success means."""
    response: Any = error.response
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    if status in _CHANGED_STATUSES:
        return SourceChanged(f"{place} was overwritten while it was read")
    if status == 404:
        return AdapterNotFound(f"No adapter found for {place}: no such bucket or object", param="lora_path")
    if status in (401, 403) or code in _AUTH_CODES:
        return AdapterSourceAuth(
            f"{place}: S3 refused the credentials of this server ({code or status})", param="lora_path"
        )
    if status == 429 or status >= 500 or code == "SlowDown":
        return Hiccup(f"S3 answered {status} {code}")
    return AdapterUnavailable(
        f"{place}: S3 answered {status} {code}; check endpoint, region and addressing style",
        param="lora_path",
    )
