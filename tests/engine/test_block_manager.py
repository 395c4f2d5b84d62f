from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loramux.engine.block_manager import BlockManager, hash_block, prefix_seed


def chain(seed: bytes, *blocks: list[int]) -> list[bytes]:
    hashes, parent = [], seed
    for tokens in blocks:
        parent = hash_block(parent, tokens)
        hashes.append(parent)
    return hashes


def test_prefix_of_another_adapter_or_salt_is_never_shared() -> None:
    seeds = {prefix_seed(None, ""), prefix_seed("a", ""), prefix_seed("b", ""), prefix_seed("a", "x")}

    hashes = {tuple(chain(seed, [1, 2], [3, 4])) for seed in seeds}

    assert len(hashes) == 4


def test_block_hash_depends_on_everything_before_it() -> None:
    seed = prefix_seed(None, "")

    assert chain(seed, [1, 2], [3, 4])[1] != chain(seed, [9, 2], [3, 4])[1]
    assert chain(seed, [1, 2], [3, 4])[1] == chain(seed, [1, 2], [3, 4])[1]


def test_released_published_block_is_found_again() -> None:
    blocks = BlockManager(4, 2)
    hashes = chain(prefix_seed(None, ""), [1, 2], [3, 4])
    held = blocks.allocate(2)
    assert held is not None
    for block, block_hash in zip(held, hashes, strict=True):
        blocks.publish(block, block_hash)

    blocks.release(held)

    assert blocks.match(hashes) == held
    assert blocks.num_free == 4


def test_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    blocks = BlockManager(2, 2)
    hashes = chain(prefix_seed(None, ""), [1, 2], [3, 4])
    held = blocks.allocate(2)
    assert held is not None
    for block, block_hash in zip(held, hashes, strict=True):
        blocks.publish(block, block_hash)
    blocks.release(held)

    blocks.allocate(1)

    assert blocks.match(hashes) == held[:1]


def test_allocation_is_all_or_nothing() -> None:
    blocks = BlockManager(3, 2)

    assert blocks.allocate(4) is None
    assert blocks.num_free == 3


def test_nothing_is_cached_when_prefix_caching_is_off() -> None:
    blocks = BlockManager(2, 2, enable_prefix_caching=False)
    held = blocks.allocate(1)
    assert held is not None
    hashes = chain(prefix_seed(None, ""), [1, 2])

    blocks.publish(held[0], hashes[0])

    assert blocks.match(hashes) == []


class BlockManagerMachine(RuleBasedStateMachine):
    """Random allocate / publish / match / release; every block stays accounted for."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(8, 2)
        self.seed = prefix_seed(None, "")

    @rule(target=held, count=st.integers(1, 4), token=st.integers(0, 3))
    def start(self, count: int, token: int) -> list[int]:
        hashes = chain(self.seed, *[[token, i] for i in range(count)])
        found = self.blocks.match(hashes)
        if count - len(found) > self.blocks.num_free_after(found):
            return []
        self.blocks.acquire(found)
        fresh = self.blocks.allocate(count - len(found))
        assert fresh is not None, "num_free_after promised room"
        for block, block_hash in zip(found + fresh, hashes, strict=True):
            self.blocks.publish(block, block_hash)
        return found + fresh

    @rule(blocks=consumes(held))
    def end(self, blocks: list[int]) -> None:
        self.blocks.release(blocks)

    @invariant()
    def consistent(self) -> None:
        self.blocks.check_invariants()


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
