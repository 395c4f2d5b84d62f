"""Flags of metrics, logs and traces: what they mean, and which values are refused."""

from __future__ import annotations

import pytest

from loramux.engine.errors import InvalidConfig
from loramux.server.config import read_config


def test_nothing_is_logged_of_prompts_and_sent_nowhere_unless_asked() -> None:
    observe = read_config(["m"], {}).observe

    assert (observe.log_requests, observe.log_outputs, observe.otlp_endpoint) == (False, False, None)
    assert (observe.log_format, observe.access_lines, observe.metrics_max_adapters) == ("text", True, 50)


def test_both_processes_log_in_one_format() -> None:
    config = read_config(["m", "--log-format", "json"], {})

    assert config.observe.log_format == config.engine.log_format == "json"


def test_quiet_paths_are_read_as_vllm_reads_them() -> None:
    config = read_config(["m", "--disable-access-log-for-endpoints", "/health, /metrics,/ping"], {})

    assert config.observe.quiet_paths == ("/health", "/metrics", "/ping")


def test_old_flag_of_vllm_means_the_default() -> None:
    config = read_config(["m", "--disable-log-requests"], {"LORAMUX_MAX_LOG_LEN": "100"})

    assert config.observe.log_requests is False
    assert config.observe.max_log_chars == 100


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--log-format=xml"], "--log-format"),
        (["--enable-log-outputs"], "--enable-log-outputs"),
        (["--max-log-len=-1"], "--max-log-len"),
        (["--metrics-max-adapters=-5"], "--metrics-max-adapters"),
        (["--otlp-traces-endpoint=grpc://collector:4317"], "--otlp-traces-endpoint"),
    ],
)
def test_wrong_values_stop_the_start_by_name(arguments: list[str], flag: str) -> None:
    with pytest.raises(InvalidConfig, match=flag) as caught:
        read_config(["m", *arguments], {})

    assert caught.value.param == flag
