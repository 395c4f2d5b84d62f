"""`--print-config` shows every value and who set it, and what it prints is a `--config` file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from loramux.engine.errors import InvalidConfig
from loramux.server import flags
from loramux.server.config import Config, read_config
from loramux.server.config_print import default_of, render_config
from loramux.server.flag import parse_count

ROOT = Path(__file__).parents[2]


def read(*argv: str, **environ: str) -> Config:
    """A configuration whose environment is only what is given."""
    return read_config(argv, environ)


def line_of(config: Config, flag: str) -> str:
    """The line that speaks of one flag."""
    lines = [line for line in render_config(config).splitlines() if line.startswith(f"{flag}:")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("dest", sorted(flags.all_flags()))
def test_every_flag_has_a_default_that_can_be_shown(dest: str) -> None:
    if dest not in ("config", "print_config", "check_config"):
        default_of(read("m"), flags.all_flags()[dest])


def test_each_value_says_who_set_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# mine\nmax-num-seqs: 3\n\nport: 5\n")

    config = read("m", "--host=::1", f"--config={file}", LORAMUX_SEED="7", VLLM_HTTP_TIMEOUT_KEEP_ALIVE="9")

    assert line_of(config, "host") == 'host: "::1"  # flag'
    assert line_of(config, "seed") == "seed: 7  # env LORAMUX_SEED"
    assert (
        line_of(config, "timeout-keep-alive") == "timeout-keep-alive: 9  # env VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    )
    assert line_of(config, "max-num-seqs") == f"max-num-seqs: 3  # {file}:2"
    assert line_of(config, "port") == f"port: 5  # {file}:4"
    assert line_of(config, "dtype") == 'dtype: "auto"  # default'
    assert line_of(config, "uds-permissions") == 'uds-permissions: "660"  # default'


def test_secrets_are_not_printed() -> None:
    text = render_config(read("m", "--api-key", "sesame", LORAMUX_HF_TOKEN="sesame"))

    assert "sesame" not in text
    assert "# api-key: <redacted>  # flag" in text
    assert "# hf-token: <redacted>  # env LORAMUX_HF_TOKEN" in text


@pytest.mark.parametrize(
    "argv",
    [
        ("m",),
        ("--model=m", "--enable-lora", "--lora-modules", "a=/x", '{"name": "b", "path": "/y"}', "--max-n=3"),
        ("m", "--allowed-origins", '["https://a", "https://b"]', "--no-enable-prefix-caching", "--seed=4"),
        ("m", "--override-generation-config", '{"temperature": 0.5}', "--uds=/s", "--uds-permissions=600"),
        ("m", "--max-model-len=2k", "--served-model-name", "x", "y z", "--engine-watchdog-timeout=1e-3"),
    ],
)
def test_what_is_printed_is_a_file_with_the_same_meaning(argv: tuple[str, ...], tmp_path: Path) -> None:
    config = read(*argv)
    file = tmp_path / "printed.yaml"
    file.write_text(render_config(config))

    again = read(f"--config={file}")

    assert again == config
    assert msgspec.yaml.decode(file.read_bytes())["model"] == "m"


NOT_PRINTED = ("config", "print_config", "check_config", "api_key", "hf_token")
# One value that is not the default for each flag that takes a text; numbers and switches need none.
SAMPLES: dict[str, str] = {
    "dtype": "float32",
    "device": "cpu",
    "load_format": "dummy",
    "kernels": "torch",
    "attention_backend": "torch",
    "kv_cache_dtype": "fp8",
    "quantization": "fp8",
    "generation_config": "vllm",
    "override_generation_config": '{"temperature": 0.5}',
    "lora_modules": "a=/x",
    "lora_dtype": "float16",
    "scheduling_policy": "priority",
    "chat_template_content_format": "openai",
    "default_chat_template_kwargs": '{"a": [1, null]}',
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
    "allowed_hosts": "*.example.org",
    "host": "::1",
    "root_path": "/v",
    "allowed_origins": '["https://a", "https://b"]',
    "allowed_methods": '["GET"]',
    "allowed_headers": '["x-a"]',
    "uds_permissions": "600",
    "uvicorn_log_level": "debug",
    "log_format": "json",
    "otlp_traces_endpoint": "http://localhost:4318",
    "ssl_cert_reqs": "2",
    "gpu_memory_utilization": "0.5",
    "max_loras": "2",
    "max_model_len": "2k",
}


def every_flag_set(tmp_path: Path) -> dict[str, str]:
    """By attribute name: a value of each flag that may be printed, as it would stand in the environment."""
    keys = tmp_path / "keys.yaml"
    keys.touch(0o600)
    keys.write_text(f"keys: [{{id: a, sha256: {'a' * 64}, scopes: [inference]}}]")
    values = {"api_keys_file": str(keys), **SAMPLES}
    default = read("m")
    for dest, flag in flags.all_flags().items():
        if dest in NOT_PRINTED:
            continue
        if flag.is_switch:
            values[dest] = "false" if default_of(default, flag) else "true"
        values.setdefault(dest, "100" if flag.type in (int, float, parse_count) else "/some: #text")
    return values


def test_every_flag_means_the_same_as_a_word_a_variable_and_a_key_of_the_file(tmp_path: Path) -> None:
    values = every_flag_set(tmp_path)
    known = flags.all_flags()
    words = [
        f"--{'no-' * (text == 'false')}{known[dest].name}" if known[dest].is_switch else f"--{dest}={text}"
        for dest, text in values.items()
    ]

    config = read(*words)

    assert set(values) | set(NOT_PRINTED) == set(known)
    assert [dest for dest in values if dest not in config.given] == []
    environ = {f"LORAMUX_{dest.upper()}": text for dest, text in values.items()}
    assert read(**environ) == read(*words, **environ)  # plugins see the environment, so both have it
    file = tmp_path / "printed.yaml"
    file.write_text(render_config(config))
    assert read(f"--config={file}") == config


def test_a_mistake_in_the_file_is_told_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nmax-lora-rnak: 5\n")

    with pytest.raises(InvalidConfig) as caught:
        read("m", f"--config={file}")

    assert caught.value.message == (
        f"--config {file}:2: max-lora-rnak: unknown flag --max-lora-rnak; did you mean --max-lora-rank?"
    )


@pytest.mark.parametrize(
    ("flag", "words"), [("--print-config", "port: 3  # flag"), ("--check-config", "is fine")]
)
def test_the_command_prints_and_ends_without_loading_anything(flag: str, words: str) -> None:
    command = [sys.executable, "-m", "loramux", "serve", "/no/such/model", "--port=3", flag]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_a_wrong_configuration_is_told_by_check_config() -> None:
    command = [sys.executable, "-m", "loramux", "serve", "m", "--port=99999", "--check-config"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "--port must be from 0 to 65535" in done.stderr


def test_every_flag_stands_on_the_configuration_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()

    missing = [flag.name for flag in flags.all_flags().values() if f"`--{flag.name}`" not in page]

    assert missing == []
