"""The values that cross the engine's border: requests in, tokens out, adapters by digest.

Everything here is frozen and made of plain values, so that it can be sent between processes as it
is. Text never appears: the server turns text into token ids and back.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """What an output must look like; compiled in the engine, off the step loop."""

    kind: Literal["json_schema", "regex", "lark", "ebnf"]
    # The schema as JSON text; a regular expression; a grammar in llguidance's Lark; one in Lark or GBNF.
    text: str


class TokenSampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one sequence is sampled; everything in token ids, already validated.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1.0 and `min_p` 0.0 are off.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] = []
    eos_token_ids: list[int] = []  # end the sequence with stop_reason None; empty under ignore_eos
    stop_token_ids: list[int] = []  # end the sequence with the id as stop_reason
    logprobs: int | None = None  # top-k alternatives beside the sampled token; None = off
    logprob_token_ids: list[int] = []  # further ones, whatever their rank; after the top-k
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    grammar: GrammarSpec | None = None  # only tokens that it allows are sampled

    @property
    def end_token_ids(self) -> list[int]:
        """Every token that ends the sequence."""
        return [*self.eos_token_ids, *self.stop_token_ids] if self.stop_token_ids else self.eos_token_ids


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate, as the engine sees it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: TokenSampling
    adapter: str | None = None  # content digest of a loaded adapter; None = the base model
    cache_salt: str = ""  # requests share prefix KV only with requests of the same salt
    priority: int = 0  # lower goes first; read only under --scheduling-policy priority


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, from the raw logits (before any processing).

    `token_ids[0]` is the chosen token (or the prompt's); the others are the top-k, best first.
    `rank` is the chosen token's 1-based rank in the vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class SequenceTiming(msgspec.Struct, frozen=True, array_like=True):
    """How a sequence fared in the engine."""

    queue_s: float  # from its arrival to its first step
    prefill_s: float  # from there to its first token
    num_preemptions: int = 0  # so far


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence."""

    request_id: str
    token_ids: list[int]  # new tokens, usually one
    finish_reason: str | None = None  # "stop", "length" or "abort"; None while it runs
    stop_reason: int | None = None  # the stop_token_id that ended it; None for EOS
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    logprobs: list[TokenLogprobs] | None = None  # one a new token, when asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token, when asked for
    timing: SequenceTiming | None = None  # with the first token and with the last
    last_is_text: bool = False  # "stop" because a grammar is complete: the last token belongs to the text


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of an adapter: its key, and where its bytes lie."""

    key: str
    file: str  # safetensors file, relative to the adapter's folder
    dtype: str  # F32, F16 or BF16
    offset: int  # first byte, counted from the start of the file


class LoraModule(msgspec.Struct, frozen=True, array_like=True):
    """The tensors of one wrapped module and how to read them.

    On the token embedding the "input" is one-hot: A is [rank, vocabulary], B [embed_dim, rank].
    """

    module: str  # path inside the base model, e.g. model.layers.3.self_attn.q_proj
    rank: int
    scale: float  # alpha / rank, or alpha / sqrt(rank) with rsLoRA; folded into B at load
    a: TensorRef  # [rank, in_features]
    b: TensorRef  # [out_features, rank]
    magnitude: TensorRef | None = None  # [out_features], DoRA's; None = plain LoRA


class TableTensor(msgspec.Struct, frozen=True, array_like=True):
    """What an adapter says about a whole vocabulary table (token embedding or output head)."""

    module: str  # e.g. model.embed_tokens or lm_head
    kind: Literal["full", "rows", "copy"]  # instead of the table | of some rows | equal to the base's
    tensor: TensorRef  # [vocabulary, embed_dim], of `rows` [len(token_ids), embed_dim]
    token_ids: list[int] = []  # of `rows`: which, each once


class AdapterFile(msgspec.Struct, frozen=True, array_like=True):
    """A weights file as the inspection read it; if it looks different later, it is another adapter."""

    name: str  # relative to the adapter's folder
    size: int  # bytes
    mtime_ns: int


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that passed inspection: everything the engine needs to read it."""

    digest: str  # sha256 hex over the canonical config and all tensor bytes
    path: str  # local folder
    rank: int  # the largest rank of any module, at least 1
    nbytes: int  # tensor bytes on disk
    modules: list[LoraModule]
    files: list[AdapterFile]
    tables: list[TableTensor] = []
    base_model: str | None = None  # what the config says it was trained on


class LoraSite(msgspec.Struct, frozen=True, array_like=True):
    """A module of the base model that an adapter may change.

    The embedding maps the vocabulary to embed_dim features, the head embed_dim features to the
    vocabulary.
    """

    in_features: int
    out_features: int
    kind: Literal["linear", "embedding", "head"] = "linear"
    is_tied: bool = False  # of the head: it shares the embedding's weight

    @property
    def is_table(self) -> bool:
        """True if it has one row a token of the vocabulary."""
        return self.kind != "linear"

    @property
    def table_shape(self) -> tuple[int, int]:
        """[vocabulary, embed_dim] of a table's weight."""
        sizes = (self.in_features, self.out_features)
        return sizes if self.kind == "embedding" else (sizes[1], sizes[0])


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine tells about itself once it can take requests."""

    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    enable_lora: bool
    max_lora_rank: int
    num_lanes: int
    lora_sites: dict[str, LoraSite]  # module path -> shape, every layer spelled out
    load_seconds: float


class FreedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What went with an unloaded adapter."""

    lanes: int
    host_bytes: int
    kv_blocks: int


STEP_TOKENS_BOUNDS = (1.0, *(float(2**power) for power in range(3, 15)))  # of EngineStats.step_tokens
MOVE_S_BOUNDS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """How many observations lie between two bounds (one more than there are bounds), and their sum."""

    counts: list[int] = []
    total: float = 0.0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine's load; what is counted is counted since `started_at`."""

    cpu_s: float = 0.0  # of the process, all threads
    resident_bytes: int = 0  # of the process now
    started_at: float = 0.0  # Unix seconds; another value = another engine, whose counts began at 0
    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0  # of the waiting ones: their adapter is not on the device
    num_preemptions: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    lanes_used: int = 0
    lanes_total: int = 0
    host_bytes: int = 0
    host_evictions: int = 0
    device_evictions: int = 0
    step_tokens: Distribution = Distribution()  # tokens computed in one step
    host_load_s: Distribution = Distribution()  # seconds to read one adapter into host memory
    device_load_s: Distribution = Distribution()  # seconds to copy one into lanes
    table_bytes: int = 0  # of the device adapters beyond their lanes; on a CPU the host's own bytes
    running_adapters: list[str] = []  # digests
    waiting_adapters: list[str] = []
    device_adapters: list[str] = []
    host_adapters: list[str] = []
