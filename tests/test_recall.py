"""Recall of rankings, by hand."""

from scripted import talk
from test_evaluation import FILMS, LOFT, NEW, OLD, WELL

from usbrec.crs.dialogue import Example
from usbrec.crs.recall import announce, copied, format_recall, popular, ranked_recall

EXAMPLES = [
    Example("d1", 2, talk("Dark, please."), "x", (WELL.title,)),
    Example("d2", 4, talk("Seen Red Loft (2001).", "So?", "More."), "x", (LOFT.title, OLD.title)),
]
FILLER = ["Night Ferry (1990)"] * 8


def test_recall_at_k_counts_labels_among_the_first_k_titles() -> None:
    """Of three labels one stands first, another third, the last nowhere: 1/3 and 2/3."""
    ranked = [
        [NEW.title, LOFT.title, WELL.title, *FILLER],
        [LOFT.title, WELL.title, NEW.title, *FILLER],
    ]
    found = ranked_recall(FILMS, EXAMPLES, ranked, {OLD.title: 3, WELL.title: 1}, 0)
    means = {name: {k: v["recall@1"]["mean"] for k, v in x.items()} for name, x in found.items()}
    third = 1 / 3
    assert means == {
        "ranked": {1: third, 10: 2 * third},
        "copy-last": {1: third, 10: third},
        "most-popular": {1: third, 10: 2 * third},
    }
    ten = found["ranked"][10]
    assert (ten["recall@1_repeated"]["mean"], ten["recall@1_repeated"]["n"]) == (1.0, 1)
    assert (ten["recall@1_new"]["mean"], ten["recall@1_new"]["n"]) == (0.5, 2)
    text = format_recall(found)
    assert "\nranked @10" in text and "\nmost-popular @1 " in text and "@50" not in text


def test_copied_titles_are_newest_first_and_once_each() -> None:
    lines = talk("Dark Well (1999)", "Red Loft (2001) or Dark Well (1999)?", "Night Ferry")
    guesses = copied(FILMS, Example("d", 1, lines, "", ()))
    assert guesses == [(OLD, NEW), (WELL,), (LOFT,)]


def test_popular_titles_are_the_catalogues_most_frequent_labels() -> None:
    counts = {"Not Ours": 9, LOFT.title: 2, WELL.title: 2, NEW.title: 3}
    assert popular(FILMS, counts) == [(NEW,), (WELL,), (LOFT,)]


def test_an_announcement_tells_a_title_from_one_that_goes_on() -> None:
    assert not announce("Heat (1995)").startswith(announce("Heat"))
