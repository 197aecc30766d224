"""The page pool: who holds which page of the key/value cache, and which tokens lie in it.

Keys and values of a sequence live in pages of `page_tokens` tokens. Sequences whose prompts begin
alike hold the same pages, so nobody computes the same prefix twice. A full page is known by a hash
that covers its tokens and all before them:

    h_i = hash(h_{i-1} || tokens_i)            h_0's predecessor is empty

Rules, in one place:

* A page is *used* (reference count ≥ 1) or *free*, never both.
* A page gets its hash only after its keys and values were computed (`register`).
* A freed page keeps its hash and contents until it is allocated anew, so a later prompt can still
  hit it. Pages without a hash are allocated first, then the least recently used; of one sequence
  the suffix goes before the prefix, since a suffix is of no use without its prefix.
* Of two pages with the same contents one is known. Using the other counts as using it, and when it
  is gone the other takes its place.
* On a hit the token ids are compared again: a collision of hashes costs time, never a wrong answer.

The pool does the bookkeeping only; the tensors are in `cache.Cache`.

>>> pool = PagePool(pages=4, page_tokens=2)
>>> first = pool.allocate(2)                     # a prompt of 4 tokens
>>> keys = chain([7, 8, 9, 3], page_tokens=2)
>>> for page, key, tokens in zip(first, keys, [(7, 8), (9, 3)]):
...     pool.register(page, key, tokens)
>>> pool.release(first)
>>> pool.match(keys, [7, 8, 9, 3]) == first      # freed, yet still known
True
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

#: tokens of a page, unless the engine is told otherwise
PAGE_TOKENS = 16


def page_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The 128-bit hash of a page: its tokens, and by `before` all tokens in front of them."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


def chain(
    ids: Sequence[int], page_tokens: int, known: Sequence[bytes] = (), before: bytes = b""
) -> list[bytes]:
    """The hashes of all full pages of `ids`; `known` are those computed before.

    before: what else the first page's contents depend on.
    """
    keys = list(known)
    for i in range(len(keys), len(ids) // page_tokens):
        page = ids[i * page_tokens : (i + 1) * page_tokens]
        keys.append(page_hash(keys[-1] if keys else before, page))
    return keys


class PagePool:
    """`pages` pages of `page_tokens` tokens: allocation, reference counts, prefix hits."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        assert pages > 0 and page_tokens > 0
        self.pages, self.page_tokens = pages, page_tokens
        self.references = [0] * pages
        self.allocations = [0] * pages  # how often each was handed out: tells its contents apart
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))  # next one first
        self._hash: list[bytes | None] = [None] * pages
        self._tokens: list[tuple[int, ...]] = [()] * pages
        self._by_hash: dict[bytes, int] = {}
        self._twins: dict[int, bytes] = {}  # page in use → its hash, by which another is known

    @property
    def tokens(self) -> int:
        """How many tokens the whole pool holds."""
        return self.pages * self.page_tokens

    @property
    def free(self) -> int:
        """Pages that `allocate` can hand out; those with a hash among them serve as cache."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Free pages whose contents are still known."""
        return sum(1 for page in self._free if self._hash[page] is not None)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def match(self, keys: Sequence[bytes], ids: Sequence[int]) -> list[int]:
        """The longest run of known pages for the front of `ids`; takes no reference.

        The last token of a prompt is never taken from the cache: its logits are wanted.
        """
        hits: list[int] = []
        for i in range(min(len(keys), (len(ids) - 1) // self.page_tokens)):
            page = self._by_hash.get(keys[i])
            span = tuple(ids[i * self.page_tokens : (i + 1) * self.page_tokens])
            if page is None or self._tokens[page] != span:
                break
            hits.append(page)
        return hits

    def free_after(self, hits: Sequence[int]) -> int:
        """Pages that stay free once `hits` are held."""
        return len(self._free) - sum(1 for page in hits if not self.references[page])

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each of `pages`."""
        for page in pages:
            self._free.pop(page, None)
            self.references[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages for new contents, each with one reference; what they held is forgotten."""
        assert 0 <= count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            assert self.references[page] == 0
            self.references[page] = 1
            self.allocations[page] += 1
            key, self._hash[page], self._tokens[page] = self._hash[page], None, ()
            if key is not None:
                del self._by_hash[key]
        return pages

    def register(self, page: int, key: bytes, tokens: Sequence[int]) -> None:
        """Make a computed page known. When another page has the same contents, that one stays."""
        assert self.references[page] > 0 and len(tokens) == self.page_tokens
        if self._hash[page] is None:
            self._tokens[page] = tuple(tokens)
            if key in self._by_hash:
                self._twins[page] = key
            else:
                self._hash[page], self._by_hash[key] = key, page

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each of a sequence's pages, given in the sequence's order."""
        for page in reversed(pages):
            assert self.references[page] > 0, f"page {page} released twice"
            self.references[page] -= 1
            if self.references[page]:
                continue
            self._free[page] = None
            if (key := self._twins.pop(page, None)) and key not in self._by_hash:
                self._hash[page], self._by_hash[key] = key, page
            if self._hash[page] is None:
                self._free.move_to_end(page, last=False)
            if key and (known := self._by_hash[key]) in self._free:
                self._free.move_to_end(known)

    def forget(self) -> None:
        """No page's contents are known any more. Only while all are free."""
        assert len(self._free) == self.pages, "forget() while pages are used"
        self._free = OrderedDict.fromkeys(range(self.pages))
        self._hash = [None] * self.pages
        self._by_hash.clear()

    def check(self) -> None:
        """Assert the rules of the module's head (tests and debugging)."""
        assert {p for p in range(self.pages) if not self.references[p]} == set(self._free)
        for key, page in self._by_hash.items():
            assert self._hash[page] == key and len(self._tokens[page]) == self.page_tokens
        assert sum(1 for key in self._hash if key is not None) == len(self._by_hash)
