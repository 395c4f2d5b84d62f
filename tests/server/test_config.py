"""Flags, environment and file: spelling, precedence, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loramux.engine.errors import InvalidConfig
from loramux.server.adapter_config import AdapterSource
from loramux.server.config import Config, read_config
from loramux.server.flags import all_flags
from loramux.server.vllm_flags import ALWAYS_ON, INERT_ALIASES, INERT_OPTIONS, INERT_SWITCHES
from loramux.version import __version__


def read(*argv: str, **environ: str) -> Config:
    return read_config(argv, environ)


def refusal(*argv: str, **environ: str) -> str:
    with pytest.raises(InvalidConfig) as caught:
        read(*argv, **environ)
    return caught.value.message


def test_model_is_positional_or_a_flag_and_names_itself() -> None:
    for config in (read("org/model"), read("--model", "org/model"), read("--model=org/model", "--port=1")):
        assert config.server.model == "org/model"
        assert config.server.served_model_names == ("org/model",)


def test_missing_or_second_model_is_refused() -> None:
    assert "no model given" in refusal("--port", "1")
    assert "two models" in refusal("a", "--model", "b")


def test_flags_take_underscores_and_switches_take_no() -> None:
    config = read("m", "--enable_lora", "--max_model_len=2K", "--no_enable_prefix_caching")

    assert config.engine.enable_lora
    assert config.engine.max_model_len == 2048
    assert not config.engine.enable_prefix_caching


@pytest.mark.parametrize(
    ("text", "value"), [("4096", 4096), ("4k", 4000), ("1.5k", 1500), ("-1", None), ("auto", None)]
)
def test_lengths_are_written_as_in_vllm(text: str, value: int | None) -> None:
    assert read("m", "--max-model-len", text).engine.max_model_len == value


def test_command_line_of_a_platform_starts() -> None:
    config = read(
        *("--model=/mnt/models", "--served-model-name", "a", "b", "--host=0.0.0.0", "--port=8080"),
        *("--enable-lora", "--max-loras=4", "--max-lora-rank=64", "--max-cpu-loras=8", "--lora-dtype=auto"),
        *("--lora-modules", "x=/p/x", '{"name": "y", "path": "/p/y", "base_model_name": "a"}'),
        *("--api-key", "k", "--uvicorn-log-level=warning", "--max-num-seqs=16"),
        *("--max-num-batched-tokens=1024", "--gpu-memory-utilization=0.5", "--dtype=bfloat16"),
        *("--enable-prefix-caching", "--enforce-eager", "--tensor-parallel-size=4", "-tp", "2"),
        *("--pipeline-parallel-size=2",),
        *("--root-path=/llm", "--ssl-keyfile=k.pem", "--ssl-certfile=c.pem", "--disable-log-requests"),
        *("--allowed-origins", '["*"]', "--trust-remote-code", "--enable-chunked-prefill"),
        *("--chat-template=t.jinja", "--hf-overrides", "{}", "--speculative-config.method", "ngram"),
    )

    assert config.server.served_model_names == ("a", "b")
    assert config.adapters.modules == (
        AdapterSource(name="x", path="/p/x"),
        AdapterSource(name="y", path="/p/y", base_model_name="a"),
    )
    assert config.server.allowed_origins == ("*",)
    assert config.engine.max_num_seqs == 16
    named = " ".join(config.warnings)
    assert config.engine.tensor_parallel_size == 2
    for flag in ("--pipeline-parallel-size", "--speculative-config"):
        assert f"{flag} has no effect" in named


def test_flag_without_effect_warns_only_when_it_would_change_something() -> None:
    assert read("m", "--pipeline-parallel-size", "1").warnings == ()
    assert len(read("m", "--pipeline-parallel-size", "2").warnings) == 1


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--max-lora"], ["--max-lora", "did you mean --max-loras"]),
        (["--enable_loar"], ["did you mean --enable-lora"]),
        (["--zzzzzz"], ["--zzzzzz", "--help"]),
        (["extra"], ["extra"]),
        (["--port", "x"], ["--port", "'x'"]),
        (["--port", "70000"], ["--port", "70000"]),
        (["--max-model-len", "1x"], ["--max-model-len", "'1x'"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "0"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "1.5"]),
        (["--uvicorn-log-level", "loud"], ["--uvicorn-log-level", "loud"]),
        (["--ssl-keyfile", "k"], ["--ssl-certfile"]),
        (["--allowed-origins", "http://x"], ["--allowed-origins", "JSON list"]),
        (["--max-loras", "4", "--max-cpu-loras", "2"], ["max_cpu_loras (2) must be >= max_loras (4)."]),
        (["--lora-modules", "x=/p"], ["--enable-lora"]),
        (["--served-model-name", ""], ["--served-model-name"]),
        (["--override-generation-config", "[]"], ["--override-generation-config"]),
        (["--shutdown-timeout", "-1"], ["--shutdown-timeout"]),
    ],
)
def test_wrong_flags_are_refused_by_name(argv: list[str], fragments: list[str]) -> None:
    message = refusal("m", *argv)

    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("modules", "fragment"),
    [
        (["nopath"], "name=path"),
        (["=path"], "name=path"),
        (["name="], "name=path"),
        (['{"name": "x"'], "Invalid JSON format for --lora-modules"),
        (['{"name": "x"}'], "Invalid fields for --lora-modules"),
        (['{"name": "x", "path": "p", "rank": 4}'], "Invalid fields for --lora-modules"),
        (['{"name": 5, "path": "p"}'], "Invalid fields for --lora-modules"),
        (['[{"name": "x", "path": "p"}]'], "Invalid fields for --lora-modules"),
        (["x=a", "x=b"], "'x' twice"),
        (["m=a"], "served base model"),
        (["a/../b=p"], "'..'"),
        (["a\nb=p"], "control characters"),
        (["a/=p"], "end with '/'"),
        (["events=p"], "adapter name 'events' is reserved: GET /v1/lora_adapters/events"),
        ([f"{'x' * 257}=p"], "256"),
    ],
)
def test_wrong_lora_modules_are_refused(modules: list[str], fragment: str) -> None:
    assert fragment in refusal("m", "--enable-lora", "--lora-modules", *modules)


def test_lora_modules_split_at_the_first_equals_sign_and_may_be_repeated() -> None:
    config = read(
        "m", "--enable-lora", "--lora-modules", "a=/p=1", "org/b:v1 x=/q", "--lora-modules", "c=/r", ""
    )

    assert [(source.name, source.path) for source in config.adapters.modules] == [
        ("a", "/p=1"),
        ("org/b:v1 x", "/q"),
        ("c", "/r"),
    ]


def test_flag_wins_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "port: 1\nhost: file\nmax_num_seqs: 3\nenable-lora: true\n"
        "served-model-name: [x, y]\nenable-dbo: true\n"
    )

    config = read("m", f"--config={file}", "--port=2", LORAMUX_PORT="4", LORAMUX_HOST="env")

    assert (config.server.port, config.server.host, config.engine.max_num_seqs) == (2, "env", 3)
    assert config.engine.enable_lora
    assert config.server.served_model_names == ("x", "y")
    assert config.warnings == ("--enable-dbo has no effect in loramux",)


def test_flag_wins_over_another_spelling_of_it_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("h11-max-header-count: 20\ndisable-prefix-caching: true\n")

    config = read("m", f"--config={file}", "--max-header-count=30", "--enable-prefix-caching")

    assert config.server.connections.max_header_count == 30
    assert config.engine.enable_prefix_caching


def test_port_of_a_kubernetes_service_with_our_name_is_not_ours() -> None:
    assert read("m", LORAMUX_PORT="tcp://10.0.0.1:8000").server.port == 8000
    assert "--port" in refusal("m", LORAMUX_PORT="eighty")


def test_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max-lora-rnak: 5\n")

    assert "did you mean --max-lora-rank" in refusal("m", f"--config={file}")


def test_environment_switches_are_read() -> None:
    assert read("m", LORAMUX_ENABLE_LORA="true").engine.enable_lora
    assert not read("m", LORAMUX_ENABLE_LORA="0").engine.enable_lora
    assert "LORAMUX_ENABLE_LORA" in refusal("m", LORAMUX_ENABLE_LORA="maybe")


def test_vllm_names_of_the_environment_work_and_must_not_contradict() -> None:
    assert read("m", VLLM_API_KEY="k").access.api_keys == ("k",)
    assert read("m", VLLM_API_KEY="k", LORAMUX_API_KEY="k").access.api_keys == ("k",)
    message = refusal("m", VLLM_PLUGINS="a", LORAMUX_PLUGINS="b")
    assert "LORAMUX_PLUGINS" in message
    assert "VLLM_PLUGINS" in message


def test_server_without_a_key_stays_on_this_machine_unless_told() -> None:
    assert read("m").server.host == "127.0.0.1"
    assert read("m", "--api-key", "k").server.host == "0.0.0.0"
    assert read("m", LORAMUX_HOST="0.0.0.0").server.host == "0.0.0.0"


def test_key_of_the_environment_may_begin_with_a_dash_and_end_with_a_line_break() -> None:
    assert read("m", LORAMUX_API_KEY="-k-\n").access.api_keys == ("-k-",)


@pytest.mark.parametrize("key", ["", " ", "sesame street", "sesame\x00", "sesamé"])
def test_key_that_no_client_could_send_stops_the_start_and_is_not_shown(key: str) -> None:
    message = refusal("m", f"--api-key={key}")

    assert message.startswith("--api-key")
    assert "sesam" not in message


@pytest.mark.parametrize("host", ["http://a", "a/b", "*", "a*", "*a.b"])
def test_host_that_is_no_name_stops_the_start(host: str) -> None:
    assert "--allowed-hosts" in refusal("m", "--allowed-hosts", host)
    assert read("m", "--allowed-hosts", "A.b", "*.c.d").access.allowed_hosts == ("a.b", "*.c.d")


def test_keys_never_show_in_the_config() -> None:
    assert "secret" not in repr(read("m", "--api-key", "secret", "--hf-token", "secret"))


def test_limits_have_flags() -> None:
    limits = read("m", "--max-n=2", "--max-request-bytes=1M", "--max-logprobs=5").server.limits

    assert (limits.n, limits.request_bytes, limits.logprobs) == (2, 1 << 20, 5)


def test_answers_have_flags() -> None:
    api = read(
        *("m", "--enable-force-include-usage", "--stream-interval=5", "--enable-tokenizer-info-endpoint"),
        *("--chat-template-content-format=openai", '--default-chat-template-kwargs={"a": 1}'),
        *("--allowed-chat-template-kwargs", "a", "b"),
    ).server.api

    assert (api.force_include_usage, api.stream_interval, api.tokenizer_info) == (True, 5, True)
    assert (api.content_format, api.template_kwargs) == ("openai", {"a": 1})
    assert api.allowed_template_kwargs == frozenset({"a", "b"})
    assert not api.trust_request_template
    assert not api.parse_special_tokens


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("--stream-interval=0", "--stream-interval must be at least 1"),
        ("--chat-template-content-format=xml", "auto, string, openai"),
        ("--default-chat-template-kwargs=[1]", "must be a JSON object"),
        ('--default-chat-template-kwargs={"messages": []}', "may not set 'messages'"),
        ("--scheduling-policy=random", "fcfs or priority"),
    ],
)
def test_wrong_answer_flags_are_refused(word: str, fragment: str) -> None:
    assert fragment in refusal("m", word)


def test_switches_for_what_is_always_on_warn_only_when_they_would_turn_it_off() -> None:
    on = read("m", "--enable-prompt-tokens-details", "--enable-request-id-headers")
    off = read("m", "--no-enable-prompt-tokens-details")

    assert on.warnings == ()
    assert off.warnings == ("--no-enable-prompt-tokens-details has no effect in loramux",)
    assert read("m", "--scheduling-policy=priority").engine.scheduling_policy == "priority"


def test_command_answers_help_and_version_without_heavy_imports() -> None:
    program = (
        "import sys; from loramux.server.cli import main; code = main(['--version']);"
        "heavy = {'torch', 'fastapi', 'pydantic', 'tokenizers', 'uvicorn'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"loramux {__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "code", "fragment"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "serve"),
        (["serve", "--help"], 0, "--lora-modules"),
        (["nope"], 2, "unknown command 'nope'"),
        (["serve"], 2, "no model given"),
        (["serve", "m", "--max-lora", "3"], 2, "did you mean --max-loras"),
    ],
)
def test_command_ends_with_a_clear_line(argv: list[str], code: int, fragment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loramux", *argv], capture_output=True, text=True, check=False
    )

    assert done.returncode == code
    assert fragment in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_where_adapters_come_from_is_set_by_flags_and_environment(tmp_path: Path) -> None:
    environ = {
        "VLLM_LORA_RESOLVER_CACHE_DIR": "/resolved",
        "LORAMUX_OFFLINE": "1",
        "LORAMUX_MAX_ADAPTER_BYTES": "2K",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    }
    words = ["m", "--enable-lora", f"--state-dir={tmp_path}", "--allowed-local-path", "/a", "/b/../c"]
    words += ["--lora-modules", "x=/mods/x", "y=hf://org/y", "z=org/z", "--no-lora-modules-strict"]
    words += ["--max-cpu-loras=20", "--host-lora-bytes=1G", "--no-copy-local-adapters"]

    config = read_config(words, environ)

    adapters = config.adapters
    assert adapters.allow_runtime_updating
    assert not adapters.modules_strict
    assert [module.uri for module in adapters.modules] == ["/mods/x", "hf://org/y", "org/z"]
    roots = ["/a", "/c", str(tmp_path / "uploads"), "/resolved", "/mods/x"]
    assert [str(root) for root in adapters.sources.allowed_local_paths] == roots
    assert (adapters.sources.offline, adapters.sources.copy_local) == (True, False)
    assert adapters.sources.max_adapter_bytes == 2048
    assert (config.engine.max_cpu_loras, config.engine.host_lora_bytes) == (20, 1 << 30)
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--adapters-file=/x"], "--adapters-file needs --enable-lora"),
        (["--adapter-load-timeout=0"], "--adapter-load-timeout must be greater than 0"),
        (["--adapters-file-interval=-1"], "--adapters-file-interval must be greater than 0"),
        (["--max-adapter-bytes=0"], "max_adapter_bytes must be greater than 0"),
    ],
)
def test_wrong_adapter_flags_are_refused(words: list[str], fragment: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_config(["m", *words], {})
    assert fragment in caught.value.message


def test_paths_of_the_command_line_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras" / "a").mkdir(parents=True)

    def uri(path: str) -> str:
        return AdapterSource(name="x", path=path).uri

    assert uri("loras/a") == uri("./loras/a") == str(tmp_path / "loras" / "a")
    assert uri("nothing") == str(tmp_path / "nothing")
    assert uri("org/name@main") == "org/name@main"
    assert uri("s3://bucket/a") == "s3://bucket/a"


def test_a_list_with_commas_is_no_list_of_adapters() -> None:
    with pytest.raises(InvalidConfig, match="one adapter a word") as caught:
        read_config(["m", "--enable-lora", "--lora-modules", "a=/x,b=/y"], {})

    assert caught.value.param == "--lora-modules"


@pytest.mark.parametrize("name", ["half", "float16", "float", "float32"])
def test_types_have_vllms_names_too(name: str) -> None:
    assert read("m", "--dtype", name).engine.dtype == name


def test_objects_may_be_given_member_by_member() -> None:
    config = read(
        *("m", "--override_generation_config.temperature", "0.2", "--override-generation-config.top_k=5"),
        *("--default-chat-template-kwargs.enable_thinking", "false"),
        *("--default-chat-template-kwargs.style.of_dates=short",),
    )

    assert config.server.override_generation_config == {"temperature": 0.2, "top_k": 5}
    assert config.server.api.template_kwargs == {"enable_thinking": False, "style": {"of_dates": "short"}}


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--override-generation-config.top_k"], "needs a member and a value"),
        (["--override-generation-config.=1"], "needs a member and a value"),
        (["--override-generation-config.a=1", "--override-generation-config={}"], "use one of the two"),
        (["--override-generation-config.a=1", "--override-generation-config.a.b=1"], "no object, at 'a'"),
        (["--max-model-len.a=1"], "unknown flag --max-model-len.a"),
    ],
)
def test_wrong_members_are_refused(words: list[str], fragment: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        read_config(["m", *words], {})

    assert fragment in caught.value.message


def test_no_flag_both_works_and_has_no_effect() -> None:
    ours = {name for flag in all_flags().values() for name in (flag.name, *flag.aliases)}

    assert ours & (INERT_SWITCHES | INERT_OPTIONS) == set()
    assert set() == INERT_SWITCHES & INERT_OPTIONS
    assert set(INERT_ALIASES.values()) <= INERT_SWITCHES | INERT_OPTIONS


def test_every_flag_of_vllm_without_effect_is_accepted_with_one_warning() -> None:
    switches = [f"--{name}" for name in sorted(INERT_SWITCHES - ALWAYS_ON)]
    options = [word for name in sorted(INERT_OPTIONS) for word in (f"--{name}", "x")]

    warnings = read("m", *switches, *options).warnings

    assert len(warnings) == len(set(warnings)) == len(switches) + len(options) // 2


def test_short_flags_of_vllm_are_accepted() -> None:
    for alias, name in INERT_ALIASES.items():
        words = [alias] if name in INERT_SWITCHES else [alias, "7"]

        assert read("m", *words).warnings == (f"--{name} has no effect in loramux",)
