"""KV blocks: who holds which, and which prompt prefixes are already computed.

A block holds `block_size` tokens of KV at every layer. It is free, in use (reference count ≥ 1), or
cached: unreferenced, but its content is known by its hash and can be taken up again until the space
is needed (least recently released first).

The hash of a full block is a sha256 chain over its tokens and everything before it, seeded with the
adapter digest and the cache salt, so that a block is shared only between requests that would compute
bit for bit the same KV. sha256 and not Python's hash(): a collision would be somebody else's prompt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as TokenIds


def prefix_seed(adapter: str | None, cache_salt: str) -> bytes:
    """The chain's start: what must be equal before tokens are compared at all."""
    return hashlib.sha256(f"{adapter or ''}\0{cache_salt}".encode()).digest()


def hash_block(parent: bytes, token_ids: TokenIds[int]) -> bytes:
    """The chain's next link: `parent` and the tokens of one full block."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockManager:
    """Reference counts, free list and prefix cache of the KV blocks. Pure bookkeeping."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_touched = 0  # this block and those above it have never been handed out
        self._refs = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}  # block -> hash, for blocks offered to the cache
        self._block_of: dict[bytes, int] = {}  # the inverse
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low ids are used first
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, oldest first
        self._owner_of: dict[int, str | None] = {}  # block -> adapter, for blocks offered to the cache

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    def match(self, hashes: list[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix of `hashes`; takes no reference."""
        blocks = []
        if self.enable_prefix_caching:
            for block_hash in hashes:
                block = self._block_of.get(block_hash)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def acquire(self, blocks: list[int]) -> None:
        """Take a reference on blocks that `match` found."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def num_free_after(self, blocks: list[int]) -> int:
        """`num_free` as it would be after `acquire(blocks)`."""
        return self.num_free - sum(1 for block in blocks if self._refs[block] == 0)

    def allocate(self, count: int) -> list[int] | None:
        """`count` fresh blocks with one reference each, or None (and no change) when there are too few."""
        if count > self.num_free:
            return None
        return [self._take() for _ in range(count)]

    def publish(self, block: int, block_hash: bytes, owner: str | None = None) -> None:
        """Offer a full, computed block to later requests. The first block of a hash wins.

        `owner` is the adapter that computed it, None for the base model; see `forget`.
        """
        if self.enable_prefix_caching and block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            self._owner_of[block] = owner

    def release(self, blocks: list[int]) -> None:
        """Give back one reference each; the tail is forgotten before the head."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} released twice"
            if self._refs[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def forget(self, owner: str) -> int:
        """Free the cached blocks of an adapter that is gone; returns how many."""
        blocks = [block for block in self._cached if self._owner_of[block] == owner]
        for block in blocks:
            del self._cached[block]
            self._unpublish(block)
            self._free.append(block)
        return len(blocks)

    def check_invariants(self) -> None:
        """Every block is in exactly one state and the hash maps agree. For tests."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block in range(self.num_blocks) if self._refs[block] > 0}
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & cached
        assert not free & used
        assert not cached & used
        assert free | cached | used == set(range(self.num_blocks))
        assert cached <= set(self._hash_of)
        assert max(cached | used, default=-1) < self.num_touched
        assert not free & set(self._hash_of)
        assert set(self._owner_of) == set(self._hash_of)
        assert {block: h for h, block in self._block_of.items()} == self._hash_of

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
            self.num_touched = max(self.num_touched, block + 1)
        else:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        self._refs[block] = 1
        return block

    def _unpublish(self, block: int) -> None:
        del self._block_of[self._hash_of.pop(block)]
        del self._owner_of[block]
