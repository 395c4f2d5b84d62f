"""Reading a /metrics page in tests."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

_PAUSE_S = 0.02


class Scrape:
    """One page."""

    def __init__(self, page: str) -> None:
        self.page = page
        self.families: dict[str, Metric] = {
            family.name: family for family in text_string_to_metric_families(page)
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of a sample over all series that have these labels; 0 without one."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def labels(self, name: str) -> list[dict[str, str]]:
        """The label sets of a sample."""
        return [
            sample.labels
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name
        ]


def scrape(http: httpx.Client) -> Scrape:
    """The server's page."""
    response = http.get("/metrics")
    assert response.status_code == 200, response.text
    return Scrape(response.text)


def scrape_until(http: httpx.Client, holds: Callable[[Scrape], bool], timeout_s: float = 10.0) -> Scrape:
    """The first page for which something holds."""
    page = scrape(http)
    for _ in range(int(timeout_s / _PAUSE_S)):
        if holds(page):
            return page
        Event().wait(_PAUSE_S)
        page = scrape(http)
    raise AssertionError(f"it never held:\n{page.page}")
