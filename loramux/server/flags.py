"""The flags of `loramux serve`, in vLLM's spelling: one table, from which the parser is built.

`--a_b` is `--a-b`, a switch `--x` has a `--no-x`, and numbers of tokens take k, m, g (thousands) and
K, M, G (powers of 1024). A flag that vLLM has and that would do nothing here is accepted with one
warning; an unknown one is an error with the nearest known name. Every default is None: `config.py`
fills in what neither flag nor environment nor file says.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from loramux.engine.errors import InvalidConfig

_SUFFIXES: Final = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "": 1,
}


def parse_count(text: str) -> int:
    """`2k` = 2000, `2K` = 2048, `-1` = -1."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise argparse.ArgumentTypeError(f"expected a whole number (k, m, g, K, M, G allowed), got {text!r}")
    return (
        int(float(match[1]) * _SUFFIXES[match[2]]) if "." in match[1] else int(match[1]) * _SUFFIXES[match[2]]
    )


def parse_length(text: str) -> int:
    """A number of tokens; `auto` is -1."""
    return -1 if text.strip() == "auto" else parse_count(text)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag that has an effect."""

    name: str  # without the dashes
    help: str
    type: Callable[[str], Any] = str
    is_switch: bool = False
    is_list: bool = False  # one or several values; may be repeated
    aliases: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """The attribute that argparse sets."""
        return self.name.replace("-", "_")


def _switch(name: str, help_: str, *aliases: str) -> Flag:
    return Flag(name, help_, is_switch=True, aliases=aliases)


# Also flags of `loramux fetch` and `loramux doctor`.
SOURCE_FLAGS: Final = (
    Flag("adapter-store-dir", "where fetched adapters are kept"),
    Flag("allowed-local-path", "folders that local adapters may lie under", is_list=True),
    Flag("pvc-root", "folder in which pvc://CLAIM/... is the folder CLAIM/..."),
    _switch("copy-local-adapters", "copy local adapters to the store before they are used (default)"),
    _switch("offline", "open no connection; serve what the store has"),
    Flag("max-adapter-bytes", "bytes of one adapter's files", parse_count),
    Flag("max-store-bytes", "bytes of the store; what was not used for longest goes", parse_count),
    Flag("min-free-bytes", "bytes that a download leaves free on the disk", parse_count),
    Flag("download-stall-timeout", "seconds without a byte after which a download starts again", float),
    Flag("max-parallel-downloads", "adapters fetched at the same time", parse_count),
)

FLAGS: Final[dict[str, tuple[Flag, ...]]] = {
    "model": (
        Flag("model", "a model folder, or a Hub id; the same as the positional MODEL"),
        Flag("served-model-name", "names that requests use for the base model", is_list=True),
        Flag("tokenizer", "folder with tokenizer.json, if it is not the model's"),
        Flag("revision", "branch, tag or commit of a Hub model"),
        Flag("download-dir", "where Hub models are stored"),
        Flag("hf-token", "token for gated Hub models"),
        Flag("dtype", "auto, bfloat16, float16 or float32"),
        Flag("device", "auto, cpu or cuda"),
        Flag("max-model-len", "context length in tokens; auto or -1 = the model's", parse_length),
        Flag("chat-template", "file with a Jinja chat template, or the template itself"),
        Flag("response-role", "role of answers in chats"),
        Flag(
            "generation-config", "auto = sampling defaults from generation_config.json; vllm = neutral ones"
        ),
        Flag("override-generation-config", "JSON object that wins over generation_config.json"),
    ),
    "LoRA": (
        _switch("enable-lora", "serve LoRA adapters"),
        Flag("lora-modules", 'adapters: name=path, or {"name": ..., "path": ...}', is_list=True),
        Flag("max-loras", "sizes the lane pool: this many adapters of rank 64 at once", parse_count),
        Flag("max-lora-rank", "adapters of a higher rank are refused", parse_count),
        Flag("num-lanes", "size of the lane pool in ranks, instead of --max-loras", parse_count),
        Flag("max-cpu-loras", "adapters in host memory; at least --max-loras", parse_count),
        Flag("host-lora-bytes", "bytes of adapters in host memory", parse_count),
        Flag("lora-dtype", "auto (the model's), bfloat16, float16 or float32"),
    ),
    "adapters that come and go": (
        _switch("lora-modules-strict", "an adapter of --lora-modules that fails stops the start (default)"),
        _switch(
            "allow-runtime-lora-updating", "clients may load and unload adapters, and resolvers are asked"
        ),
        Flag("adapter-load-timeout", "seconds a request waits for an adapter that is being loaded", float),
        Flag("state-dir", "folder for the journal, which brings adapters back after a restart"),
        Flag("adapters-file", "YAML file with the adapters to serve; watched"),
        Flag("adapters-file-interval", "seconds between two looks at it", float),
    ),
    "where adapters come from": SOURCE_FLAGS,
    "engine": (
        Flag("max-num-seqs", "sequences that run at the same time", parse_count),
        Flag("max-num-batched-tokens", "tokens computed in one step", parse_count),
        Flag("block-size", "tokens a KV block", parse_count),
        Flag("num-gpu-blocks-override", "number of KV blocks", parse_count),
        Flag(
            "kv-cache-bytes",
            "KV cache on a CPU, in bytes",
            parse_count,
            aliases=("kv-cache-memory-bytes",),
        ),
        Flag("gpu-memory-utilization", "share of the GPU's memory to use", float),
        _switch("enable-prefix-caching", "reuse the KV of equal prompt starts"),
        Flag("seed", "for requests that bring none", int),
        Flag("num-threads", "CPU compute threads", parse_count),
    ),
    "HTTP": (
        Flag("host", "address to listen on; 127.0.0.1 unless there is a key"),
        Flag("port", "port to listen on; 0 = any free one", int),
        Flag("api-key", "keys that requests must bring one of", is_list=True),
        Flag("root-path", "path prefix under which a proxy shows the server"),
        Flag("allowed-origins", "JSON list of origins for CORS"),
        Flag("allowed-methods", "JSON list of methods for CORS"),
        Flag("allowed-headers", "JSON list of headers for CORS"),
        _switch("allow-credentials", "allow credentials for CORS"),
        Flag("ssl-keyfile", "TLS key"),
        Flag("ssl-certfile", "TLS certificate"),
        Flag("ssl-ca-certs", "CA certificates for client certificates"),
        Flag("ssl-cert-reqs", "client certificates: 0 none, 1 optional, 2 required", int),
        Flag("ssl-ciphers", "TLS ciphers"),
        Flag("uvicorn-log-level", "critical, error, warning, info, debug or trace"),
        _switch("disable-uvicorn-access-log", "no line for each request"),
        _switch("disable-fastapi-docs", "no /docs, /redoc and /openapi.json"),
        Flag("timeout-keep-alive", "seconds an idle connection stays open", int),
        Flag("sse-keep-alive-interval", "seconds of silence before a comment is sent; 0 = never", float),
        Flag("shutdown-timeout", "seconds that running requests get at the end; 0 = abort them", float),
        Flag("config", "YAML file with these flags as keys"),
    ),
    "limits of one request": (
        Flag("max-request-bytes", "bytes of a body", parse_count),
        Flag("max-messages", "messages of a chat", parse_count),
        Flag("max-prompts", "prompts of a completion call", parse_count),
        Flag("max-n", "choices a prompt", parse_count),
        Flag("max-stop", "stop strings", parse_count),
        Flag("max-stop-token-ids", "stop token ids", parse_count),
        Flag("max-logit-bias", "entries of logit_bias and allowed_token_ids", parse_count),
        Flag("max-bad-words", "bad words", parse_count),
        Flag("max-logprobs", "log-probabilities a token", parse_count),
    ),
}

# vLLM's flags that change nothing here. Switches take no value, the others take one or several.
INERT_SWITCHES: Final = frozenset(
    """
    trust-remote-code enforce-eager enable-chunked-prefill fully-sharded-loras async-scheduling headless
    enable-tower-connector-lora specialize-active-lora enable-mixed-moe-lora-format enable-lora-bias
    enable-moe-shared-loras enable-force-include-usage return-tokens-as-token-ids tokens-only enable-dbo
    enable-prompt-tokens-details enable-per-request-metrics enable-server-load-tracking enable-ssl-refresh
    enable-request-id-headers enable-log-requests disable-log-requests enable-log-outputs disable-log-stats
    log-error-stack enable-tokenizer-info-endpoint enable-offline-docs enable-sleep-mode enable-scale-out
    enable-auto-tool-choice exclude-tools-when-tool-choice-none trust-request-chat-template
    trust-request-mm-kwargs disable-frontend-multiprocessing enable-prompt-embeds use-tqdm-on-load
    disable-custom-all-reduce enable-expert-parallel disable-hybrid-kv-cache-manager skip-tokenizer-init
    disable-sliding-window disable-cascade-attn calculate-kv-scales enable-reasoning use-v2-block-manager
    multi-step-stream-outputs enable-multimodal-encoder-data-parallel disable-async-output-proc
    """.split()  # noqa: SIM905 (one name a line would be a page)
)
INERT_OPTIONS: Final = frozenset(
    """
    tensor-parallel-size pipeline-parallel-size data-parallel-size api-server-count tokenizer-mode
    data-parallel-size-local data-parallel-address data-parallel-rpc-port data-parallel-backend
    data-parallel-rank data-parallel-start-rank
    chat-template-content-format default-chat-template-kwargs reasoning-parser tool-call-parser
    tool-parser-plugin reasoning-parser-plugin quantization kv-cache-dtype prefix-caching-hash-algo
    scheduling-policy max-num-queued-reqs max-num-queued-tokens stream-interval load-format code-revision
    tokenizer-revision hf-overrides hf-config-path config-format fingerprint-mode fingerprint-value
    max-log-len logprobs-mode swap-space cpu-offload-gb default-mm-loras lora-target-modules uds
    max-lora-cls-labels lora-extra-vocab-size long-lora-scaling-factors middleware max-seq-len-to-capture
    h11-max-incomplete-event-size h11-max-header-count distributed-executor-backend worker-cls
    compilation-config speculative-config speculative-model num-speculative-tokens model-loader-extra-config
    guided-decoding-backend structured-outputs-config limit-mm-per-prompt mm-processor-kwargs
    max-parallel-loading-workers num-lookahead-slots num-scheduler-steps max-num-partial-prefills
    max-long-partial-prefills long-prefill-token-threshold kv-transfer-config kv-events-config
    additional-config otlp-traces-endpoint collect-detailed-traces disable-access-log-for-endpoints task
    runner convert allowed-local-media-path model-impl attention-backend kv-offloading-size
    kv-offloading-backend rope-scaling rope-theta ignore-patterns cuda-graph-sizes log-config-file
    preemption-mode override-neuron-config override-pooler-config pooler-config scheduler-cls
    mm-processor-cache-gb media-io-kwargs interleave-mm-strings node-rank nnodes master-addr master-port
    """.split()  # noqa: SIM905
)
INERT_ALIASES: Final = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-asc": "api-server-count",
    "-q": "quantization",
    "-O": "compilation-config",
}
_HARMLESS_VALUES: Final = {  # asking for what is the case anyway needs no warning
    "tensor-parallel-size": "1",
    "pipeline-parallel-size": "1",
    "data-parallel-size": "1",
    "api-server-count": "1",
    "tokenizer-mode": "auto",
    "load-format": "auto",
    "kv-cache-dtype": "auto",
    "chat-template-content-format": "auto",
    "scheduling-policy": "fcfs",
}


class ServeParser(argparse.ArgumentParser):
    """Argparse that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise `InvalidConfig`."""
        raise InvalidConfig(message)


def build_parser() -> ServeParser:
    """The parser for what follows `loramux serve`."""
    parser = ServeParser(
        prog="loramux serve",
        allow_abbrev=False,
        description="Serve a model and its LoRA adapters to OpenAI clients. Every flag can also be set as "
        "LORAMUX_NAME in the environment; vLLM's other flags are accepted and named in a warning.",
    )
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help="a model folder, or a Hub id")
    for title, flags in FLAGS.items():
        add_flags(parser, title, flags)
    for name in sorted(INERT_SWITCHES):
        parser.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, dest=f"inert {name}", help=argparse.SUPPRESS
        )
    short = {name: alias for alias, name in INERT_ALIASES.items()}
    for name in sorted(INERT_OPTIONS):
        names = [f"--{name}", *([short[name]] if name in short else [])]
        parser.add_argument(*names, nargs="+", action="extend", dest=f"inert {name}", help=argparse.SUPPRESS)
    return parser


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Sequence[Flag]) -> None:
    """Let a parser take these flags; the value of one that is not given is None."""
    group = parser.add_argument_group(title)
    for flag in flags:
        _add(group, flag)


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{name}" for name in (flag.name, *flag.aliases)]
    if flag.is_switch:
        group.add_argument(
            *names, dest=flag.dest, action=argparse.BooleanOptionalAction, default=None, help=flag.help
        )
    elif flag.is_list:
        group.add_argument(*names, dest=flag.dest, nargs="+", action="extend", type=flag.type, help=flag.help)
    else:
        group.add_argument(*names, dest=flag.dest, type=flag.type, help=flag.help)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of `loramux serve`.

    Returns:
        The values (None where a flag was not given), and one warning for each flag without effect.

    Raises:
        InvalidConfig: an unknown flag or a value of the wrong kind.
    """
    namespace, unknown = build_parser().parse_known_args([_canonical(word) for word in argv])
    for word in unknown:
        _refuse(word)
    return namespace, _warnings(namespace)


def all_flags() -> dict[str, Flag]:
    """Every flag that has an effect, by its attribute name."""
    return {flag.dest: flag for flags in FLAGS.values() for flag in flags}


def _canonical(word: str) -> str:
    """`--a_b=1` as `--a-b=1`; `--disable-x` of an inert or known `--enable-x` as `--no-enable-x`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("_", "-")
    dotted = name.partition(".")[0]
    if dotted != name and dotted in INERT_OPTIONS:  # --speculative-config.method ngram
        name = dotted
    opposite = f"enable-{name.removeprefix('disable-')}"
    if name.startswith("disable-") and name not in _KNOWN and opposite in _KNOWN:
        name = f"no-{opposite}"
    return f"--{name}{equals}{value}"


_KNOWN: Final = (
    frozenset(flag.name for flags in FLAGS.values() for flag in flags) | INERT_SWITCHES | INERT_OPTIONS
)


def _refuse(word: str) -> NoReturn:
    if not word.startswith("-"):
        raise InvalidConfig(f"unexpected argument {word!r}")
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name.lstrip("-"), sorted(_KNOWN), n=1, cutoff=0.6)
    hint = f"; did you mean --{near[0]}?" if near else "; see `loramux serve --help`"
    raise InvalidConfig(f"unknown flag {name}{hint}", param=name)


def _warnings(namespace: argparse.Namespace) -> list[str]:
    found: list[str] = []
    for dest, value in sorted(vars(namespace).items()):
        name = dest.removeprefix("inert ")
        if dest == name or value is None or value == [_HARMLESS_VALUES.get(name)]:
            continue
        shown = f"--no-{name}" if value is False else f"--{name}"
        found.append(f"{shown} has no effect in loramux")
    return found
