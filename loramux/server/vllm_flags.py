"""vLLM's flags that change nothing here; each is accepted with one warning line."""

from __future__ import annotations

from typing import Final

# Switches take no value, the options one or several.
INERT_SWITCHES: Final = frozenset(
    """
    trust-remote-code enforce-eager enable-chunked-prefill fully-sharded-loras async-scheduling headless
    enable-tower-connector-lora specialize-active-lora enable-mixed-moe-lora-format enable-lora-bias
    enable-moe-shared-loras tokens-only enable-dbo
    enable-prompt-tokens-details enable-server-load-tracking
    enable-request-id-headers disable-log-stats
    log-error-stack enable-offline-docs enable-sleep-mode enable-scale-out
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
    tool-parser-plugin reasoning-parser-plugin quantization kv-cache-dtype prefix-caching-hash-algo
    load-format code-revision
    tokenizer-revision hf-overrides hf-config-path config-format fingerprint-mode fingerprint-value
    logprobs-mode swap-space cpu-offload-gb default-mm-loras lora-target-modules
    max-lora-cls-labels lora-extra-vocab-size long-lora-scaling-factors middleware max-seq-len-to-capture
    distributed-executor-backend worker-cls
    compilation-config speculative-config speculative-model num-speculative-tokens model-loader-extra-config
    guided-decoding-backend structured-outputs-config limit-mm-per-prompt mm-processor-kwargs
    max-parallel-loading-workers num-lookahead-slots num-scheduler-steps max-num-partial-prefills
    max-long-partial-prefills long-prefill-token-threshold kv-transfer-config kv-events-config
    additional-config collect-detailed-traces task
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
ALWAYS_ON: Final = frozenset(  # switches that ask for what is the case anyway
    """
    enable-chunked-prefill enable-prompt-tokens-details enable-request-id-headers
    enable-server-load-tracking
    """.split()  # noqa: SIM905
)
HARMLESS_VALUES: Final = {  # asking for what is the case anyway needs no warning
    "tensor-parallel-size": "1",
    "pipeline-parallel-size": "1",
    "data-parallel-size": "1",
    "api-server-count": "1",
    "tokenizer-mode": "auto",
    "load-format": "auto",
    "kv-cache-dtype": "auto",
}
