"""vLLM's metrics of finished requests; those of tokens are counted as they come, in `call_record.py`.

What vLLM counts for each of its engine's requests is counted here for each sequence: a call with n = 3 is
three. Only `request_params_n` and `request_max_num_generation_tokens` are once a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from loramux.server.observe import buckets
from loramux.server.observe.call_record import CallRecord, SequenceRecord, TokenMetrics
from loramux.server.observe.series import Families, Family, Histogram, LabelledCounter

FINISH_REASONS: Final = ("stop", "length", "tool_calls", "abort", "error", "repetition")


class RequestMetrics:
    """Adds finished calls up.

    Args:
        max_model_len: the largest number of tokens that a sequence can have.
    """

    def __init__(self, max_model_len: int) -> None:
        sizes = buckets.token_counts(max_model_len)
        self.tokens = TokenMetrics()
        self.finished = LabelledCounter(["finished_reason"], [(reason,) for reason in FINISH_REASONS])
        self.e2e_s = Histogram(buckets.REQUEST_S)
        self.queue_s = Histogram(buckets.REQUEST_S)
        self.inference_s = Histogram(buckets.REQUEST_S)
        self.prefill_s = Histogram(buckets.REQUEST_S)
        self.decode_s = Histogram(buckets.REQUEST_S)
        self.mean_token_s = Histogram(buckets.TOKEN_S)
        self.num_prompt = Histogram(sizes)
        self.num_output = Histogram(sizes)
        self.num_computed = Histogram(sizes)
        self.most_output = Histogram(sizes)
        self.max_tokens = Histogram(sizes)
        self.n = Histogram(buckets.NUM_CHOICES)
        self.num_preemptions = Histogram(buckets.NUM_PREEMPTIONS)

    def add(self, call: CallRecord) -> None:
        """Count a call that is over, however it ended; one that never reached the engine counts nothing."""
        if not call.sequences:
            return
        self.n.observe(call.n)
        self.most_output.observe(max(sequence.num_output for sequence in call.sequences))
        for sequence in call.sequences:
            self._add_sequence(call, sequence)

    def _add_sequence(self, call: CallRecord, sequence: SequenceRecord) -> None:
        self.finished.add(sequence.finish_reason or call.unfinished)
        self.e2e_s.observe(call.ended_s - call.started_s)
        self.num_prompt.observe(sequence.num_prompt)
        self.num_output.observe(sequence.num_output)
        self.max_tokens.observe(call.max_tokens)
        self.num_preemptions.observe(sequence.num_preemptions)
        if not sequence.first_s:
            return
        decode_s = sequence.last_s - sequence.first_s
        self.decode_s.observe(decode_s)
        self.num_computed.observe(sequence.num_prompt - sequence.num_cached)
        if sequence.num_output > 1:
            self.mean_token_s.observe(decode_s / (sequence.num_output - 1))
        if sequence.queue_s is not None and sequence.prefill_s is not None:
            self.queue_s.observe(sequence.queue_s)
            self.prefill_s.observe(sequence.prefill_s)
            self.inference_s.observe(sequence.prefill_s + decode_s)

    def collect(self, make: Families) -> Iterator[Family]:
        """Every family, also before the first request."""
        tokens = self.tokens
        computed = tokens.num_prompt - tokens.num_cached
        by_source = LabelledCounter(["source"])
        by_source.add("local_compute", by=computed)
        by_source.add("local_cache_hit", by=tokens.num_cached)
        by_source.add("external_kv_transfer", by=0)
        yield make.counter("vllm:prompt_tokens", "Prompt tokens processed.", tokens.num_prompt)
        yield make.counters("vllm:prompt_tokens_by_source", "Prompt tokens by where from.", by_source)
        yield make.counter(
            "vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.", tokens.num_cached
        )
        yield make.counter("vllm:generation_tokens", "Tokens generated.", tokens.num_generated)
        yield make.counters("vllm:request_success", "Sequences that ended, by reason.", self.finished)
        for name, text, histogram in self._histograms():
            yield make.histogram(f"vllm:{name}", text, histogram)

    def _histograms(self) -> list[tuple[str, str, Histogram]]:
        return [
            (
                "time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                self.tokens.first_token_s,
            ),
            ("inter_token_latency_seconds", "Between two outputs of a sequence.", self.tokens.token_s),
            (
                "request_time_per_output_token_seconds",
                "A sequence's mean seconds a token after the first.",
                self.mean_token_s,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", self.e2e_s),
            ("request_queue_time_seconds", "Waiting in the engine.", self.queue_s),
            ("request_inference_time_seconds", "From the first step to the last token.", self.inference_s),
            ("request_prefill_time_seconds", "From the first step to the first token.", self.prefill_s),
            ("request_decode_time_seconds", "From the first token to the last.", self.decode_s),
            ("request_prompt_tokens", "Prompt tokens of a sequence.", self.num_prompt),
            ("request_generation_tokens", "Generated tokens of a sequence.", self.num_output),
            (
                "request_max_num_generation_tokens",
                "Generated tokens of a call's longest sequence.",
                self.most_output,
            ),
            ("request_params_n", "Choices that a call asked for.", self.n),
            ("request_params_max_tokens", "Tokens that a call asked for at most.", self.max_tokens),
            (
                "request_num_preemptions",
                "How often a sequence had to make room for others.",
                self.num_preemptions,
            ),
            (
                "request_prefill_kv_computed_tokens",
                "Prompt tokens of a sequence that no cache had.",
                self.num_computed,
            ),
        ]
