"""The flags of `loramux serve` that have an effect: one table, from which the parser is built.

Every default is None: `config.py` fills in what neither flag nor environment nor file says.
"""

from __future__ import annotations

from typing import Final

from loramux.server.flag import Flag, parse_count, parse_length, parse_permissions, switch

# Also flags of `loramux fetch` and `loramux doctor`.
SOURCE_FLAGS: Final = (
    Flag("adapter-store-dir", "where fetched adapters are kept"),
    Flag("allowed-local-path", "folders that local adapters may lie under", is_list=True),
    Flag("pvc-root", "folder in which pvc://CLAIM/... is the folder CLAIM/..."),
    switch("copy-local-adapters", "copy local adapters to the store before they are used (default)"),
    switch("offline", "open no connection; serve what the store has"),
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
        Flag("dtype", "auto, bfloat16, float16 (half) or float32 (float)"),
        Flag("device", "auto, cpu or cuda"),
        Flag(
            "load-format",
            "auto or safetensors: the model's files; dummy: random weights, for benchmarks; config.json and "
            "tokenizer are enough",
        ),
        Flag(
            "quantization",
            "of the base model's weights: int8 (CPUs; linear layers and head), or fp8 (NVIDIA GPUs from "
            "compute capability 8.9; linear layers); adapters and embedding keep the model's dtype",
            short="q",
        ),
        Flag("max-model-len", "context length in tokens; auto or -1 = the model's", parse_length),
        Flag("chat-template", "file with a Jinja chat template, or the template itself"),
        Flag("response-role", "role of answers in chats"),
        Flag(
            "generation-config", "auto = sampling defaults from generation_config.json; vllm = neutral ones"
        ),
        Flag(
            "override-generation-config", "JSON object that wins over generation_config.json", is_object=True
        ),
    ),
    "LoRA": (
        switch("enable-lora", "serve LoRA adapters"),
        Flag("lora-modules", 'adapters: name=path, or {"name": ..., "path": ...}', is_list=True),
        Flag("max-loras", "sizes the lane pool: this many adapters of rank 64 at once", parse_count),
        Flag("max-lora-rank", "adapters of a higher rank are refused", parse_count),
        Flag("num-lanes", "size of the lane pool in ranks, instead of --max-loras", parse_count),
        Flag("max-cpu-loras", "adapters in host memory; at least --max-loras", parse_count),
        Flag("host-lora-bytes", "bytes of adapters in host memory", parse_count),
        Flag("lora-dtype", "auto (the model's), bfloat16, float16 (half) or float32 (float)"),
    ),
    "adapters that come and go": (
        switch("lora-modules-strict", "an adapter of --lora-modules that fails stops the start (default)"),
        switch(
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
        Flag("scheduling-policy", "fcfs, or priority: requests with the lowest `priority` first"),
        Flag("kernels", "auto (triton on a GPU), triton, or torch: plain operations, slower"),
        Flag(
            "attention-backend",
            "auto, triton, torch, varlen (FlashAttention through torch) or flashinfer; also by vLLM's names",
        ),
        Flag("kv-cache-dtype", "auto (the model's), or fp8: half the bytes, rounded to e4m3"),
        switch("enforce-eager", "GPU: launch every kernel by itself, without CUDA graphs"),
        Flag(
            "cudagraph-capture-sizes",
            "GPU: tokens of the steps that become CUDA graphs",
            parse_count,
            is_list=True,
            aliases=("cuda-graph-sizes",),
        ),
        Flag("max-cudagraph-capture-size", "GPU: no CUDA graph for steps of more tokens", parse_count),
        switch("async-scheduling", "plan a step while the last one runs (default on a GPU)"),
        switch("enable-prefix-caching", "reuse the KV of equal prompt starts"),
        Flag("seed", "for requests that bring none", int),
        Flag(
            "num-threads",
            "CPU compute threads, of all ranks together (default: one a physical core, within the CPU limit "
            "of the container)",
            parse_count,
        ),
        Flag(
            "tensor-parallel-size",
            "ranks that share each layer's work: GPUs, or with --device cpu processes",
            parse_count,
            short="tp",
        ),
    ),
    "answers": (
        switch("enable-force-include-usage", "streams carry usage in every chunk, asked for or not"),
        switch("enable-per-request-metrics", "answers carry the times of their request as `metrics`"),
        switch("return-tokens-as-token-ids", "log-probabilities name tokens as token_id:N"),
        Flag("stream-interval", "tokens a chunk of a stream, after the first", parse_count),
        switch("enable-tokenizer-info-endpoint", "GET /tokenizer_info shows the tokenizer's configuration"),
        Flag("chat-template-content-format", "how templates see content: auto, string or openai"),
        Flag(
            "default-chat-template-kwargs",
            "JSON object: chat_template_kwargs of requests without them",
            is_object=True,
        ),
        Flag(
            "allowed-chat-template-kwargs",
            "names that requests may set; all others are refused",
            is_list=True,
        ),
        switch("trust-request-chat-template", "requests may bring their own chat template"),
        switch(
            "parse-special-tokens-in-messages",
            "control tokens that are written in messages count as such, as with vLLM",
        ),
    ),
    "tools and reasoning": (
        Flag(
            "tool-call-parser",
            "format of a model's tool calls: hermes, llama3_json, mistral, pythonic; "
            "auto = as the chat template shows; none",
        ),
        switch("enable-auto-tool-choice", 'tool_choice "auto" works; without the flag, if a format is known'),
        switch("exclude-tools-when-tool-choice-none", 'tool_choice "none" keeps tools out of the prompt'),
        Flag(
            "reasoning-parser",
            "how a model marks its reasoning: qwen3, deepseek_r1; auto = as the chat template shows; none",
        ),
    ),
    "access": (
        Flag(
            "api-key", "keys with all rights; requests must bring a key as soon as there is one", is_list=True
        ),
        Flag("api-keys-file", "YAML file of hashed keys with their rights; read again on SIGHUP"),
        Flag("audit-log", "file that gets a JSON line for every change of an adapter and every refusal"),
        Flag("allowed-hosts", "names allowed in the Host header, also *.example.org", is_list=True),
        Flag("forwarded-allow-ips", "proxies whose X-Forwarded-For is believed, by comma; * = all"),
        switch("guard-metrics", "/metrics needs a key with the scope admin"),
    ),
    "HTTP": (
        Flag("host", "address to listen on; 127.0.0.1 unless there is a key"),
        Flag("port", "port to listen on; 0 = any free one", int),
        Flag("root-path", "path prefix under which a proxy shows the server"),
        Flag("allowed-origins", "JSON list of origins for CORS"),
        Flag("allowed-methods", "JSON list of methods for CORS"),
        Flag("allowed-headers", "JSON list of headers for CORS"),
        switch("allow-credentials", "allow credentials for CORS"),
        Flag("ssl-keyfile", "TLS key"),
        Flag("ssl-certfile", "TLS certificate"),
        Flag("ssl-ca-certs", "CA certificates for client certificates"),
        Flag("ssl-cert-reqs", "client certificates: 0 none, 1 optional, 2 required", int),
        Flag("ssl-ciphers", "TLS ciphers"),
        switch("enable-ssl-refresh", "follow the TLS files: new connections get the new certificate"),
        Flag("uds", "path of a Unix socket to listen on, instead of --host and --port"),
        Flag("uds-permissions", "who may connect to it, in octal; 660 unless given", parse_permissions),
        switch("disable-fastapi-docs", "no /docs, /redoc and /openapi.json"),
        Flag("timeout-keep-alive", "seconds an idle connection stays open", int),
        Flag("sse-keep-alive-interval", "seconds of silence before a comment is sent; 0 = never", float),
        Flag("shutdown-timeout", "seconds that running requests get at the end; 0 = abort them", float),
    ),
    "metrics, logs and traces": (
        Flag("uvicorn-log-level", "critical, error, warning, info, debug or trace"),
        Flag("log-format", "text, or json: one object a line"),
        switch("disable-uvicorn-access-log", "log lines only for requests that ask the model for something"),
        Flag("disable-access-log-for-endpoints", "paths without log lines, by comma", is_list=True),
        switch("enable-log-requests", "log prompts; without it none is ever logged"),
        switch("enable-log-outputs", "log answers, too; needs --enable-log-requests"),
        Flag("max-log-len", "characters of a logged prompt or answer", parse_count),
        Flag("metrics-max-adapters", "adapters with metrics of their own; the rest is 'other'", parse_count),
        Flag("otlp-traces-endpoint", "OTLP/HTTP address that gets a span for each request"),
    ),
    "life of the engine": (
        Flag("engine-watchdog-timeout", "seconds of silence after which an engine hangs; 0 = never", float),
        Flag("engine-restart-wait", "seconds that a request waits for a new engine; 0 = refuse it", float),
        Flag(
            "max-engine-restarts",
            "engines started in a row, none of which finished a request, before the server ends",
            parse_count,
        ),
    ),
    "how much work at once": (
        Flag("max-num-queued-reqs", "sequences that wait for their first token", parse_count),
        Flag("max-num-queued-tokens", "prompt tokens of these", parse_count),
        Flag("max-key-requests", "sequences of one API key, waiting and running; 0 = no limit", parse_count),
        Flag("max-key-tokens", "prompt tokens of these; 0 = no limit", parse_count),
        Flag(
            "max-adapter-requests", "sequences of one adapter, waiting and running; 0 = no limit", parse_count
        ),
        Flag("max-queue-wait", "seconds a call may wait for its first token; 0 = no limit", float),
    ),
    "connections": (
        Flag("max-connections", "open connections", parse_count),
        Flag(
            "max-header-bytes",
            "bytes of a request line and its headers",
            parse_count,
            aliases=("h11-max-incomplete-event-size",),
        ),
        Flag("max-header-count", "headers of a request", parse_count, aliases=("h11-max-header-count",)),
        Flag("max-buffered-bytes", "bytes of all bodies that are being received", parse_count),
        Flag("request-header-timeout", "seconds a client may take to send its headers", float),
        Flag("request-read-timeout", "seconds for a body to arrive; each 16 KiB of it add one", float),
        Flag("stream-write-timeout", "seconds that an answer may wait for its client to read", float),
    ),
    "configuration": (
        Flag("config", "YAML file with these flags as keys"),
        switch("print-config", "print every value and who set it, as YAML, and end"),
        switch("check-config", "end after the configuration was checked"),
    ),
    "limits of one request": (
        Flag("max-request-bytes", "bytes of a body", parse_count),
        Flag("max-messages", "messages of a chat", parse_count),
        Flag("max-tools", "tools of a chat", parse_count),
        Flag("max-tools-bytes", "bytes of their JSON", parse_count),
        Flag("max-prompts", "prompts of a completion call", parse_count),
        Flag("max-n", "choices a prompt", parse_count),
        Flag("max-stop", "stop strings", parse_count),
        Flag("max-stop-token-ids", "stop token ids", parse_count),
        Flag("max-logit-bias", "entries of logit_bias and allowed_token_ids", parse_count),
        Flag("max-bad-words", "bad words", parse_count),
        Flag("max-logprobs", "log-probabilities a token", parse_count),
        Flag("max-schema-bytes", "bytes of a JSON schema, of a grammar, or of all choices", parse_count),
        Flag("max-schema-depth", "levels of lists and objects in a JSON schema", parse_count),
        Flag("max-regex-bytes", "bytes of a regular expression", parse_count),
        Flag("max-choices", "choices of structured_outputs", parse_count),
        Flag("grammar-compile-timeout", "seconds that compiling one grammar may take", float),
        Flag(
            "max-grammars-in-flight",
            "grammars that are compiled at the same time or wait for it",
            parse_count,
        ),
        Flag("max-string-chars", "characters of one stop string or bad word", parse_count),
        Flag("max-sequences", "sequences of a call: prompts x n", parse_count),
        Flag("max-prompt-tokens", "tokens of all prompts of a call", parse_count),
        Flag("max-json-depth", "levels of lists and objects in a body", parse_count),
        Flag("max-json-values", "values in a body; a string counts 4, a list or object 16", parse_count),
        Flag("max-prompt-logprob-values", "log-probabilities of prompt tokens in one answer", parse_count),
        Flag("max-logprob-token-ids", "entries of logprob_token_ids", parse_count),
        Flag("max-chat-template-bytes", "bytes of a request's own chat template", parse_count),
    ),
}
