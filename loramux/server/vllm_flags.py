"""vLLM's flags that change nothing here; each is accepted with one warning line."""

from __future__ import annotations

from typing import Final

# Switches take no value, the options one or several.
INERT_SWITCHES: Final = frozenset(
    """
    aggregate-engine-logging allow-deprecated-quantization calculate-kv-scales
    cohere-is-reasoning-model cudagraph-metrics data-parallel-external-lb data-parallel-hybrid-lb
    data-parallel-multi-port-external-lb dcp-q-replicate disable-async-output-proc disable-cascade-attn
    disable-chunked-mm-input disable-custom-all-reduce disable-frontend-multiprocessing
    disable-hybrid-kv-cache-manager disable-log-stats disable-logprobs-during-spec-decoding
    disable-mm-preprocessor-cache disable-nccl-for-dp-synchronization disable-sliding-window
    enable-batch-sharded-sampling enable-bf16x3-router-gemm enable-chunked-prefill
    enable-cumem-allocator enable-cutedsl-warmup enable-dbo enable-elastic-ep enable-ep-weight-filter
    enable-eplb enable-expert-parallel enable-fault-tolerance enable-flash-late-interaction
    enable-flashinfer-autotune enable-layerwise-nvtx-tracing enable-log-deltas
    enable-logging-iteration-details enable-lora-bias enable-mamba-cache-stochastic-rounding
    enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras
    enable-multimodal-encoder-data-parallel enable-offline-docs enable-prompt-adapter
    enable-prompt-embeds enable-prompt-tokens-details enable-reasoning enable-request-id-headers
    enable-return-routed-experts enable-scale-out enable-server-load-tracking enable-sleep-mode
    enable-tower-connector-lora fail-on-environ-validation fully-sharded-loras grpc
    guided-decoding-disable-additional-properties guided-decoding-disable-any-whitespace
    guided-decoding-disable-fallback headless jit-monitor-verbose kv-cache-metrics
    kv-sharing-fast-prefill language-model-only log-error-stack mm-device-do-normalize mm-encoder-only
    multi-step-stream-outputs numa-bind per-request-spec-decode-metrics ray-workers-use-nsight
    scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init specialize-active-lora
    speculative-disable-mqa-scorer tokens-only trust-remote-code trust-request-mm-kwargs use-fp64-gumbel
    use-replayssm use-tqdm-on-load use-v2-block-manager
    """.split()  # noqa: SIM905 (one name a line would be a page)
)
INERT_OPTIONS: Final = frozenset(
    """
    additional-config all2all-backend allowed-local-media-path allowed-media-domains api-server-count
    attention-config code-revision cohere-format collect-detailed-traces
    compilation-config config-format convert cp-kv-cache-interleave-size cpu-distributed-timeout-seconds
    cpu-offload-gb cpu-offload-params data-parallel-address
    data-parallel-backend data-parallel-rank data-parallel-rpc-port data-parallel-size
    data-parallel-size-local data-parallel-start-rank data-parallel-supervisor-port
    dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size
    decode-context-parallel-size default-mm-loras device-ids diffusion-config
    distributed-executor-backend distributed-timeout-seconds dp-supervisor-probe-failure-threshold
    dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s dp-sync-interval ec-manager-config
    ec-transfer-config eplb-config expert-placement-strategy external-parameters fault-tolerance-config
    fingerprint-mode fingerprint-value gdn-prefill-backend guided-decoding-backend hf-config-path
    hf-overrides ignore-patterns interleave-mm-strings io-processor-plugin ir-op-priority
    jit-monitor-mode kda-prefill-backend kernel-config kv-cache-dtype-skip-layers
    kv-cache-metrics-sample kv-events-config kv-offloading-backend kv-offloading-size kv-transfer-config
    limit-mm-per-prompt linear-backend log-config-file logits-processor-pattern
    logits-processors logprobs-mode long-lora-scaling-factors long-prefill-token-threshold
    lora-extra-vocab-size lora-target-modules mamba-backend mamba-block-size mamba-cache-dtype
    mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype master-addr master-port
    max-long-partial-prefills max-lora-cls-labels max-num-partial-prefills
    max-num-scheduled-tokens max-parallel-loading-workers max-prompt-adapter-token max-prompt-adapters
    max-seq-len-to-capture media-io-kwargs middleware mm-encoder-attn-backend mm-encoder-attn-dtype
    mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path
    mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb
    mm-processor-cache-type mm-processor-device mm-processor-kwargs mm-shm-cache-max-object-size-mb
    mm-tensor-ipc model-class-overrides model-impl model-loader-extra-config moe-backend
    ngram-prompt-lookup-max ngram-prompt-lookup-min nnodes node-rank num-lookahead-slots
    num-scheduler-steps num-speculative-tokens numa-bind-cpus numa-bind-nodes offload-backend
    offload-group-size offload-num-in-group offload-params offload-prefetch-step optimization-level
    override-attention-dtype override-neuron-config override-pooler-config performance-mode
    pipeline-parallel-size pooler-config preemption-mode prefill-context-parallel-size
    prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo prefix-match-unit
    profiler-config pt-load-map-location quantization-param-path reasoning-config
    reasoning-parser-plugin renderer-num-workers replayssm-buffer-len rope-scaling rope-theta runner
    safetensors-load-strategy safetensors-prefetch-block-size safetensors-prefetch-num-threads
    scheduler-cls scheduler-delay-factor show-hidden-metrics-for-version spec-decoding-acceptance-method
    spec-method spec-model spec-tokens speculative-config speculative-disable-by-batch-size
    speculative-draft-tensor-parallel-size speculative-max-model-len speculative-model
    speculative-model-quantization structured-outputs-config swap-space task
    tokenizer-mode tokenizer-pool-extra-config tokenizer-pool-size tokenizer-pool-type
    tokenizer-revision tool-parser-plugin tool-server ubatch-size video-pruning-method
    video-pruning-rate watermark weight-transfer-config worker-cls worker-extension-cls
    """.split()  # noqa: SIM905
)
INERT_ALIASES: Final = {
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-asc": "api-server-count",
    "-O": "compilation-config",
    "-cc": "compilation-config",
    "-dcp": "decode-context-parallel-size",
    "-pcp": "prefill-context-parallel-size",
    "-dpn": "data-parallel-rank",
    "-dpr": "data-parallel-start-rank",
    "-dpl": "data-parallel-size-local",
    "-dpa": "data-parallel-address",
    "-dpp": "data-parallel-rpc-port",
    "-dpb": "data-parallel-backend",
    "-dph": "data-parallel-hybrid-lb",
    "-dpe": "data-parallel-external-lb",
    "-dpm": "data-parallel-multi-port-external-lb",
    "-ep": "enable-expert-parallel",
    "-n": "nnodes",
    "-r": "node-rank",
    "-sc": "speculative-config",
    "-dc": "diffusion-config",
    "-ac": "attention-config",
}
ALWAYS_ON: Final = frozenset(  # switches that ask for what is the case anyway
    """
    enable-chunked-prefill enable-prompt-tokens-details enable-request-id-headers
    enable-server-load-tracking
    """.split()  # noqa: SIM905
)
HARMLESS_VALUES: Final = {  # asking for what is the case anyway needs no warning
    "pipeline-parallel-size": "1",
    "data-parallel-size": "1",
    "api-server-count": "1",
    "tokenizer-mode": "auto",
}
