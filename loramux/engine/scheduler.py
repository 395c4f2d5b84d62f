"""Who runs in the next step, with which KV blocks and adapter lanes. Pure policy, time passed in.

One step computes at most `max_num_batched_tokens` tokens. Running sequences come first (one token
each while decoding, a chunk while their prompt is still being read), then waiting ones in order of
arrival. A sequence whose next token finds no free block makes room by preempting the youngest:
its blocks are released and it is recomputed later, which the prefix cache makes cheap. With
`by_priority`, the lowest number waits shortest and is preempted last; arrival decides between equals.

Lanes are a second budget. A waiting sequence whose adapter is not on the device yet is skipped, so
that others go ahead, and its adapter is fetched meanwhile; so are those of the next sequences in the
queue. Once one has been deferred for `MAX_DEFERRAL_S`, no other adapter is admitted before it, so
that lanes drain and it cannot starve.

A step may be planned while another one runs: each sequence is taken to yield the token that it samples
there. What is needed of that token, or would be taken from a running sequence, waits until the step is
done: then `schedule` plans nothing. A sequence that turns out to have ended leaves when the last step
that computes it is done, and what that step sampled for it is dropped.

Blocks, lanes and leases are released in one place: `_release`, which `_leave` and `_preempt` share.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable

from loramux.engine.adapters.store import AdapterStore
from loramux.engine.block_manager import BlockManager, hash_block, prefix_seed
from loramux.engine.grammar import GrammarMatcher
from loramux.engine.sequence import Sequence, SequenceStatus, reads_output
from loramux.engine.step import ScheduledBatch, ScheduledSequence, StepResult, output_of
from loramux.engine.types import Request, SequenceOutput

MAX_DEFERRAL_S = 2.0
LOOK_AHEAD = 16  # waiting sequences beyond the admitted ones whose adapters are fetched already


class Scheduler:
    """Continuous batching with chunked prefill, preemption and adapter lanes."""

    def __init__(
        self,
        *,
        blocks: BlockManager,
        adapters: AdapterStore,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        by_priority: bool = False,
        shared_prefix_limit: int | None = None,
        reads_output: Callable[[Sequence], bool] = reads_output,
    ) -> None:
        """Args:
        shared_prefix_limit: with dynamic RoPE, prompts above this length rotate all their keys
            by their own length and must not share them with prompts of another length.
        reads_output: whether a sequence's next token can be chosen only when its last one is known here.
        """
        self.blocks = blocks
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.by_priority = by_priority
        self.shared_prefix_limit = shared_prefix_limit
        self._reads_output = reads_output
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.leaving: list[Sequence] = []  # ended, but a step still computes them
        self.num_steps_running = 0  # scheduled and not yet updated
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens looked up
        self.prefix_hits = 0  # tokens found
        self._by_id: dict[str, Sequence] = {}

    def has_work(self) -> bool:
        """True while any sequence is waiting or running, or any step is."""
        return bool(self._by_id) or self.num_steps_running > 0

    def add(self, request: Request, now: float, matcher: GrammarMatcher | None = None) -> None:
        """Queue a request; its adapter must be loaded. It starts when `matcher` is ready, if it has one."""
        assert request.request_id not in self._by_id
        seq = Sequence(request, now, matcher)
        if seq.adapter is not None:
            self.adapters.lease(seq.adapter)
        self._by_id[seq.request_id] = seq
        self._enqueue(seq)

    def abort(self, request_id: str) -> None:
        """Drop a sequence, wherever it is; an unknown id is fine."""
        seq = self._by_id.get(request_id)
        if seq is not None:
            self._finish(seq)

    def fail_waiting(self, adapter: str) -> list[str]:
        """Drop the waiting sequences of an adapter that cannot be had; returns their ids."""
        failed = [seq for seq in self.waiting if seq.adapter == adapter]
        for seq in failed:
            self._finish(seq)
        return [seq.request_id for seq in failed]

    def schedule(self, now: float) -> ScheduledBatch | None:
        """Choose the next step; None when nothing can run, or not before the running step is done."""
        if any(seq.num_pending and self._reads_output(seq) for seq in self.running):
            return None
        budget = self.max_num_batched_tokens
        chosen: list[tuple[Sequence, int]] = []
        preempted = False
        for seq in sorted(self.running, key=lambda s: s.num_tokens - s.num_computed > 1):
            if seq.status is not SequenceStatus.RUNNING:
                continue  # preempted a moment ago to make room for another
            count = min(seq.num_tokens - seq.num_computed, budget)
            if count == 0 or (
                seq.num_pending and seq.num_output + seq.num_pending >= seq.sampling.max_tokens
            ):
                continue
            end = seq.num_computed + count
            if self.num_steps_running and self._blocks_missing(seq, end) > self.blocks.num_free:
                return None  # nobody is preempted while a step computes it
            preempted |= not self._has_room(seq, end)
            if seq.status is SequenceStatus.RUNNING:
                chosen.append((seq, count))
                budget -= count
        chosen = [(seq, count) for seq, count in chosen if seq.status is SequenceStatus.RUNNING]
        if not preempted:
            self._admit(chosen, budget, now)
        return self._begin(chosen) if chosen else None

    def update(
        self, batch: ScheduledBatch, result: StepResult, now: float | None = None
    ) -> list[SequenceOutput]:
        """Take in a step's results: append, finish, release. Returns what to send, timed if `now`.

        Steps are updated in the order in which they were scheduled.
        """
        outputs: list[SequenceOutput] = []
        self.num_steps_running -= 1
        for item in batch.sequences:
            seq = item.seq
            seq.steps_running -= 1
            seq.num_pending -= item.samples
            if seq.status is not SequenceStatus.RUNNING:  # ended or aborted while the step ran
                if not seq.steps_running:
                    self.leaving.remove(seq)
                    self._leave(seq)
                continue
            self._publish(seq, item.end)
            seq.prompt_logprobs += result.prompt_logprobs.get(seq.request_id, [])
            if not item.samples:
                continue
            if seq.request_id in result.failed:
                self._finish(seq)
                continue
            sampled = None if seq.request_id in result.ended else result.sampled[seq.request_id]
            if sampled is not None:
                seq.append(sampled.token_id)
            output = output_of(seq, sampled, now)
            outputs.append(output)
            if output.finish_reason is not None:
                self._finish(seq)
        return outputs

    def check_invariants(self) -> None:
        """Blocks and lanes are held exactly by the sequences that run or leave. For tests."""
        self.blocks.check_invariants()
        self.adapters.check_invariants()
        assert len(self.running) <= self.max_num_seqs
        assert len(self.running) + len(self.waiting) == len(self._by_id)
        held = {block for seq in self.running + self.leaving for block in seq.block_ids}
        assert len(held) == self.blocks.num_used
        assert all(seq.steps_running for seq in self.leaving)
        assert all(seq.steps_running <= self.num_steps_running for seq in self.running + self.leaving)
        assert all(not seq.block_ids and seq.lanes is None for seq in self.waiting)

    def _begin(self, chosen: list[tuple[Sequence, int]]) -> ScheduledBatch:
        """Take for granted what the step will have done."""
        items = []
        for seq, count in chosen:
            start, seq.num_computed = seq.num_computed, seq.num_computed + count
            samples = seq.num_computed == seq.num_tokens
            seq.num_pending += samples
            seq.steps_running += 1
            items.append(ScheduledSequence(seq, start, count, samples))
        self.num_steps_running += 1
        return ScheduledBatch(items)

    def _blocks_missing(self, seq: Sequence, end: int) -> int:
        return -(-end // self.blocks.block_size) - len(seq.block_ids)

    def _has_room(self, seq: Sequence, end: int) -> bool:
        """Give `seq` blocks up to token `end`, preempting the youngest; False if any was preempted."""
        needed = self._blocks_missing(seq, end)
        clean = True
        while needed > 0:
            fresh = self.blocks.allocate(needed)
            if fresh is not None:
                seq.block_ids += fresh
                return clean
            clean = False
            self._preempt(self._least_important())
            if seq.status is not SequenceStatus.RUNNING:
                return clean  # it was the youngest itself
        return clean

    def _admit(self, chosen: list[tuple[Sequence, int]], budget: int, now: float) -> None:
        skipped: list[Sequence] = []
        wanted: set[str] = set()  # adapters of sequences that stay in the queue
        starving: str | None = None  # an adapter that has been deferred for too long
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting.popleft()
            skipped.append(seq)
            if starving is not None and seq.adapter not in (None, starving):
                continue
            if seq.adapter is not None and not self.adapters.is_on_device(seq.adapter):
                has_room = self.adapters.prefetch(seq.adapter, keep=wanted)
                wanted.add(seq.adapter)
                if not has_room and starving is None and now - seq.arrival_s > MAX_DEFERRAL_S:
                    starving = seq.adapter
                continue
            if seq.matcher is not None and not seq.matcher.is_ready:
                continue  # its grammar is being compiled
            hashes, found = self._find_prefix(seq)
            num_found = len(found) * self.blocks.block_size
            count = min(seq.num_tokens - num_found, budget)
            fresh_needed = -(-(num_found + count) // self.blocks.block_size) - len(found)
            if fresh_needed > self.blocks.num_free_after(found):
                break  # first come, first served: nobody overtakes for want of KV
            skipped.pop()
            self._start(seq, hashes, found, fresh_needed)
            if seq.started_s is None:
                seq.started_s = now
            chosen.append((seq, count))
            budget -= count
        self._look_ahead(wanted | {seq.adapter for seq in skipped if seq.adapter is not None})
        self.waiting.extendleft(reversed(skipped))

    def _look_ahead(self, wanted: set[str]) -> None:
        """Fetch the adapters of the next sequences in the queue, without taking anybody's lanes."""
        for seq in itertools.islice(self.waiting, LOOK_AHEAD):
            if seq.adapter is None:
                continue
            if not self.adapters.is_on_device(seq.adapter):
                self.adapters.prefetch(seq.adapter, keep=wanted)
            wanted.add(seq.adapter)

    def _start(self, seq: Sequence, hashes: list[bytes], found: list[int], fresh_needed: int) -> None:
        self.blocks.acquire(found)
        fresh = self.blocks.allocate(fresh_needed)
        assert fresh is not None
        seq.block_ids = found + fresh
        seq.block_hashes = hashes
        seq.num_hashed_blocks = len(found)
        seq.num_computed = len(found) * self.blocks.block_size
        if seq.num_output == 0:
            seq.num_cached = seq.num_computed
            self.prefix_queries += seq.num_prompt
            self.prefix_hits += seq.num_cached
        if seq.adapter is not None:
            seq.lanes = self.adapters.acquire(seq.adapter)
            assert seq.lanes is not None
        seq.become(SequenceStatus.RUNNING)
        self.running.append(seq)

    def _find_prefix(self, seq: Sequence) -> tuple[list[bytes], list[int]]:
        """The hash chain over the full blocks of `seq`, and the cached blocks it may start from.

        At least one token is left to compute, since its logits are what the step is for.
        """
        if not self.blocks.enable_prefix_caching:
            return [], []
        hashes = self._extend_hashes(seq, [], seq.num_tokens)
        if seq.wants_prompt_logprobs:
            return hashes, []
        usable = (seq.num_tokens - 1) // self.blocks.block_size
        return hashes, self.blocks.match(hashes[:usable])

    def _extend_hashes(self, seq: Sequence, hashes: list[bytes], num_tokens: int) -> list[bytes]:
        size = self.blocks.block_size
        parent = hashes[-1] if hashes else self._seed(seq)
        for end in range((len(hashes) + 1) * size, num_tokens + 1, size):
            parent = hash_block(parent, seq.token_ids[end - size : end])
            hashes.append(parent)
        return hashes

    def _seed(self, seq: Sequence) -> bytes:
        salt = seq.request.cache_salt
        if self.shared_prefix_limit is not None and seq.num_prompt > self.shared_prefix_limit:
            salt = f"{salt}\0{seq.num_prompt}"
        return prefix_seed(seq.adapter, salt)

    def _publish(self, seq: Sequence, num_computed: int) -> None:
        """Offer the blocks that are now full and computed to the prefix cache."""
        full = num_computed // self.blocks.block_size
        if not self.blocks.enable_prefix_caching or full <= seq.num_hashed_blocks:
            return
        if len(seq.block_hashes) < full:
            self._extend_hashes(seq, seq.block_hashes, num_computed)
        for index in range(seq.num_hashed_blocks, full):
            self.blocks.publish(seq.block_ids[index], seq.block_hashes[index], seq.adapter)
        seq.num_hashed_blocks = full

    def _preempt(self, seq: Sequence) -> None:
        assert not seq.steps_running
        self.running.remove(seq)
        self._release(seq)
        seq.prompt_logprobs = []
        seq.become(SequenceStatus.WAITING)
        self._enqueue(seq, again=True)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def _enqueue(self, seq: Sequence, *, again: bool = False) -> None:
        """Put a sequence at its place in the queue: behind its equals, or before them if it has run."""
        if not self.by_priority:
            self.waiting.appendleft(seq) if again else self.waiting.append(seq)
            return
        find = bisect.bisect_left if again else bisect.bisect_right
        self.waiting.insert(find(self.waiting, seq.request.priority, key=_priority), seq)

    def _least_important(self) -> Sequence:
        """The running sequence to preempt: the youngest, of the highest priority number."""
        if not self.by_priority:
            return self.running[-1]
        return max(reversed(self.running), key=_priority)

    def _finish(self, seq: Sequence) -> None:
        """End a sequence for good. It leaves now, or with the step that computes it."""
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        seq.become(SequenceStatus.FINISHED)
        del self._by_id[seq.request_id]
        if seq.steps_running:
            self.leaving.append(seq)
        else:
            self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        self._release(seq)
        if seq.adapter is not None:
            self.adapters.release(seq.adapter)

    def _release(self, seq: Sequence) -> None:
        """Give back everything that a sequence holds on the device."""
        self.blocks.release(seq.block_ids)
        if seq.lanes is not None:
            assert seq.adapter is not None
            self.adapters.lanes.unpin(seq.adapter)
        seq.lanes = None
        seq.block_ids = []
        seq.block_hashes = []
        seq.num_hashed_blocks = 0
        seq.num_computed = 0


def _priority(seq: Sequence) -> int:
    return seq.request.priority
