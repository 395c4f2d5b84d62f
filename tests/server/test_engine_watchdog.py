"""An engine that hangs is told from one that computes, and from a server that was not there to look."""

from __future__ import annotations

from loramux.server.engine_watchdog import Watchdog, cpu_seconds


def looks(watchdog: Watchdog, times: int, *, speaks: bool, cpu_share: float, first: int = 0) -> str | None:
    """The first complaint in so many looks, each an interval after the one before."""
    for number in range(first, first + times):
        now_s = number * watchdog.interval_s
        why = watchdog.look(now_s if speaks else 0.0, now_s * cpu_share, now_s)
        if why is not None:
            return why
    return None


def test_silence_without_computing_is_a_hang() -> None:
    watchdog = Watchdog(10.0)

    assert looks(watchdog, 10, speaks=False, cpu_share=0.0) is None
    why = looks(watchdog, 3, speaks=False, cpu_share=0.0, first=10)

    assert why == "it has neither said nor computed anything for 10.0 s"


def test_a_long_step_is_no_hang() -> None:
    assert looks(Watchdog(10.0), 190, speaks=False, cpu_share=0.9) is None


def test_computing_for_ever_is_a_hang_in_the_end() -> None:
    assert looks(Watchdog(10.0), 210, speaks=False, cpu_share=1.0) == "it has said nothing for 200 s"


def test_an_idle_engine_that_speaks_is_well() -> None:
    assert looks(Watchdog(10.0), 1000, speaks=True, cpu_share=0.0) is None


def test_a_server_that_was_stopped_does_not_blame_the_engine() -> None:
    watchdog = Watchdog(10.0)
    watchdog.look(0.0, 0.0, 0.0)

    assert watchdog.look(0.0, 0.0, 3600.0) is None


def test_no_watchdog_never_complains() -> None:
    assert looks(Watchdog(0.0), 1000, speaks=False, cpu_share=0.0) is None


def test_processor_time_of_a_process_that_is_gone_is_unknown() -> None:
    assert cpu_seconds(2**22 + 1) is None
