"""HTTP requests by route, under the names that prometheus-fastapi-instrumentator made common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from loramux.server.observe import buckets
from loramux.server.observe.series import Families, Family, Histogram, LabelledCounter

# Probes and scrapes would drown the rest.
UNCOUNTED: Final = frozenset({"/health", "/live", "/ready", "/ping", "/version", "/load"})
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_NO_ROUTE: Final = "none"


class HttpMetrics:
    """Counts and times by route template, never by path: clients choose paths.

    Args:
        error_codes: shown as 0 before any such error.
    """

    def __init__(self, error_codes: Iterable[str]) -> None:
        self.errors = LabelledCounter(["code"], [(code,) for code in sorted(set(error_codes))])
        self.requests = LabelledCounter(["handler", "method", "status"])
        self.fine_s = Histogram(buckets.HTTP_FINE_S)
        self._by_route: dict[tuple[str, str], Histogram] = {}

    def add(
        self, route: str | None, method: str, status: int | None, seconds: float, error: str | None
    ) -> None:
        """Count one request.

        Args:
            route: its template; None if nothing matched.
            method: as sent.
            status: of the answer; None if the client left before there was one.
            seconds: from its arrival to its end.
            error: code of the error that the client was told, also inside a stream.
        """
        if route is not None and (route in UNCOUNTED or route.startswith("/metrics")):
            return
        if error is not None:
            self.errors.add(error)
        method = method if method in _METHODS else "other"
        route = route or _NO_ROUTE
        self.requests.add(route, method, f"{(status or 499) // 100}xx")
        self.fine_s.observe(seconds)
        key = (route, method)
        if key not in self._by_route:
            self._by_route[key] = Histogram(buckets.HTTP_S)
        self._by_route[key].observe(seconds)

    def collect(self, make: Families) -> Iterator[Family]:
        """Every family."""
        yield make.counters("http_requests", "Requests by route, method and status class.", self.requests)
        yield make.counters("loramux:request_errors", "Requests that failed, by error code.", self.errors)
        yield make.histograms(
            "http_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            ["handler", "method"],
            list(self._by_route.items()),
        )
        yield make.histogram(
            "http_request_duration_highr_seconds", "The same over all routes, in finer steps.", self.fine_s
        )
