"""A search in a memory too small for it: the same texts, the same values."""

import pytest
from scripted import talk
from test_engine import engine

from usbrec.crs.agents import Roles, Side
from usbrec.crs.catalogue import Catalogue
from usbrec.crs.ses import SearchOptions, search


def test_an_eviction_in_the_middle_of_a_search_changes_no_result() -> None:
    """A large memory holds the whole search, a small one not: the same texts, values to 1e-4."""

    def found(capacity: int) -> tuple[list[object], list[float | None], int]:
        e, evicted = engine(capacity), []
        plain = e.cache.evict
        e.cache.evict = lambda n: (evicted.append(n), plain(n))  # type: ignore[assignment]
        options = SearchOptions(mode="tree", max_new_tokens=6, summary_tokens=6)
        roles = Roles(Side(e, "one"), Side(e, "two"), Catalogue([]))
        results = search(roles, [talk("A comedy."), talk("War!")], [1, 2], options)
        candidates = [c for result in results for c in result.candidates]
        leaves = [leaf for c in candidates for leaf in c.leaves]
        texts = [(r.root, r.profile) for r in results] + [c.reply for c in candidates]
        texts += [(leaf.dialogue, leaf.draws, leaf.score.label) for leaf in leaves]
        return texts, [leaf.score.score for leaf in leaves], len(evicted)

    texts, values, none = found(40000)
    same_texts, same_values, some = found(1300)
    assert same_texts == texts and same_values == pytest.approx(values, abs=1e-4)
    assert none == 0 and some > 0
