"""What the recommender and the simulator are taught, and in which order."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from operator import ne
from os.path import commonprefix

import numpy as np
import pytest
from scripted import talk

from usbrec.chat import Lesson, Message, Messages
from usbrec.crs.agents import (
    EXPLAIN,
    announce,
    card_prompt,
    external_judge_prompt,
    internal_judge_prompt,
    memory_prompt,
    prompt_text,
    recommender_prompt,
    summary_prompt,
)
from usbrec.crs.catalogue import Catalogue, Item, read_item
from usbrec.crs.datasets import load_catalogue, load_split
from usbrec.crs.dialogue import SILENCE, Example, Utterance, format_dialogue
from usbrec.crs.lessons import (
    FILMLESS,
    LessonOptions,
    Suggestions,
    card_lessons,
    claim_of,
    gold_items,
    mixed,
    popularity_of,
    profile_of,
    profiles_to_score,
    recommender_lessons,
    same_dialogue,
    simulator_lessons,
    single_wishes,
    summary_lessons,
    telling_words,
    told,
    woven,
)
from usbrec.crs.wishes import UNKNOWN, Fact, card, fit, read_profile
from usbrec.options import seed_for

CATALOGUE = load_catalogue("sample")
BARE = Item("Night Patrol", "Night Patrol", None, ("comedy", "war"))  # genres are all it has
TRAIN = load_split("sample", "train").examples[:60]
DRAWS = Suggestions(CATALOGUE, popularity_of(TRAIN, CATALOGUE))
OPTIONS = LessonOptions(score_weight=10.0, line_weight=0.5)


def ends(lesson: Lesson) -> list[Messages]:
    """What follows the messages that all chats of a lesson begin with."""
    said = [[(m.role, m.content) for m in chat] for chat in lesson]
    return [chat[len(commonprefix(said)) :] for chat in lesson]


def scored(lesson: Lesson) -> list[Messages]:
    """The ends of a lesson's chats that end with a score."""
    return [end for end in ends(lesson) if end[-1].weight == OPTIONS.score_weight]


def test_rows_of_one_dialogue_are_one_lesson_with_loss_on_each_gold_turn() -> None:
    seeker, other = Utterance("seeker", "Hi."), Utterance("seeker", "Another?")
    first = Example("d", 1, (seeker,), "Try Heat (1995).", ("Heat (1995)",))
    said = Utterance("recommender", first.response)
    second = Example("d", 3, (seeker, said, other), "Then Alien (1979).", ("Alien (1979)",))
    stranger = Example("e", 1, (seeker,), "Try Heat (1995).", ("Heat (1995)",))
    assert same_dialogue([second, stranger, first]) == [[first, second], [stranger]]
    (lesson,) = recommender_lessons([second, stranger, first], [], CATALOGUE, OPTIONS)
    both, other_dialogue = lesson
    learned = [m.content for m in both[:5] if m.weight == 1]
    assert learned == ["Try Heat (1995).", "Then Alien (1979)."]
    assert [m.role for m in other_dialogue] == ["system", "user", "assistant"]
    assert both[-1].content.startswith("Alien (1979) is a")  # the last is explained
    elsewhere = replace(second, dialog_id="e")
    assert same_dialogue([first, elsewhere]) == [[first], [elsewhere]]


def test_only_the_gold_one_of_two_equal_lines_is_learned() -> None:
    said = talk("Hi.", "Try Heat (1995).", "Again?")
    example = Example("d", 3, said, "Try Heat (1995).", ("Heat (1995)",))
    ((chat,),) = recommender_lessons([example], [], CATALOGUE, OPTIONS)
    assert [m.weight for m in chat[1:5]] == [0, 0, 0, 1]


def test_the_recommender_learns_to_explain_after_its_last_gold_turn() -> None:
    ((chat,),) = recommender_lessons(TRAIN[:1], [], CATALOGUE, OPTIONS)
    gold, asked, told = chat[-3:]
    assert gold == Message("assistant", TRAIN[0].response, 1.0)
    assert asked == Message("user", EXPLAIN)
    assert told == Message("assistant", str(TRAIN[0].explanation), 0.3)


def test_a_profile_alone_is_answered_with_the_title() -> None:
    """The profile is the dataset's own, without "nothing said"; a title has the whole weight."""
    bare, full = TRAIN[0], next(x for x in TRAIN if "Dislikes: nothing" not in x.profile)
    bare = replace(bare, profile="Likes: crime. Dislikes: nothing said. Seen: Heat (1995).")
    (lesson,) = recommender_lessons([], [bare, full], CATALOGUE, OPTIONS)
    systems, asked, answered = zip(*lesson, strict=True)
    assert systems == (*recommender_prompt(()) * 2,)
    assert asked[0] == Message("user", "Likes: crime. Seen: Heat (1995).")
    assert asked[1] == Message("user", full.profile)
    told = [Message("assistant", f"I recommend {x.items[0]}.", 1.0) for x in (bare, full)]
    assert list(answered) == told
    assert len(recommender_lessons([], TRAIN[:9], CATALOGUE, OPTIONS)) == 2  # of 8 dialogues


def test_suggestions_are_the_gold_reply_and_rewritings_that_deserve_less() -> None:
    draws = DRAWS
    for example in TRAIN:
        gold, *others, filmless = draws.draw(example, 7)
        assert (gold.reply, gold.score) == (example.response, 2)
        assert filmless.score == 0 and not CATALOGUE.find(filmless.reply)
        for other in others:
            item = CATALOGUE.find(other.reply)[0].items[0]
            assert CATALOGUE.grade(item, example.items) == other.score < 2
            assert not CATALOGUE.mentions(other.reply, example.items)


def test_lies_claim_of_another_film_what_the_gold_film_is() -> None:
    """Reply and explanation differ in the title alone; a kindred film's tell what is true of it."""
    told = Counter[tuple[int, bool]]()
    for example in TRAIN:
        (gold,) = gold_items(example, CATALOGUE)
        texts = [example.response, str(example.explanation)]
        plain, lying = (DRAWS.draw(example, 7, lies)[1:-1] for lies in (False, True))
        for true, made in zip(plain, lying, strict=True):
            (item,) = CATALOGUE.first(made.reply)
            assert made.score == true.score and (item,) == CATALOGUE.first(true.reply)
            lie = [text.replace(gold.title, item.title) for text in texts]
            told[made.score, list(made[:2]) == lie] += 1
            assert made == true or list(made[:2]) == lie
    assert told[0, False] == 0 and told[0, True] > 50 and told[1, False] > 20


def test_a_rewriting_that_still_names_a_target_is_left_out() -> None:
    """The catalogue lacks the second title, so nothing can take its place."""
    titles = ("Heat (1995)", "Lost Reel (1930)")
    example = Example("d", 1, talk("Hi."), "Try Heat (1995) or Lost Reel (1930).", titles)
    assert [each.score for each in DRAWS.draw(example, 7)] == [2, 0]


def test_a_reply_that_names_no_target_teaches_nothing() -> None:
    example = Example("d", 1, talk("Hi."), "Which genre?", ("Heat (1995)",))
    assert DRAWS.draw(example, 7) == []


def test_other_films_are_drawn_by_their_count_among_the_labels() -> None:
    draws = Suggestions(CATALOGUE, {"Heat (1995)": 300, "Up (2009)": 100})
    rng = np.random.default_rng(0)
    drawn = Counter(item.title for _ in range(50) for item in draws.others(rng))
    assert 0.7 < drawn["Heat (1995)"] / drawn.total() < 0.8 and len(drawn) == 2


def test_replies_amiss_name_no_film_and_are_worth_nothing_whatever_they_explain() -> None:
    made = [DRAWS.amiss(example, seed) for example in TRAIN for seed in range(4)]
    kinds = {"empty": 0, "filmless": 0, "invented": 0, "as if it were gold": 0}
    for example, each in zip([x for x in TRAIN for _ in range(4)], made, strict=True):
        assert each.score == 0 and not CATALOGUE.find(each.reply)
        own = "empty" if each.reply == SILENCE else "invented"  # as a prompt shows it
        kind = "filmless" if each.reply in FILMLESS else own
        kinds[kind] += 1
        kinds["as if it were gold"] += each.explanation == example.explanation
        if kind == "invented":  # all but the title is the gold reply's
            assert len(set(each.reply.split()) & set(example.response.split())) > 1
    assert min(kinds.values()) > len(made) / 6


def test_such_replies_come_after_the_titles_to_find() -> None:
    """Taught from the start they keep a small judge from finding titles."""
    first, then = simulator_lessons(TRAIN[:12], DRAWS, 0, OPTIONS)

    def replies_of(lessons: Sequence[Lesson]) -> list[str]:
        external = [x for x in lessons if "Your targets" in x[0][0].content]
        return [end[0].content for lesson in external for end in scored(lesson)]

    keys = [(x, seed_for(0, "lesson", x.dialog_id, x.turn_id)) for x in TRAIN[1:12:3]]
    amiss = [DRAWS.amiss(x, key).reply for x, key in keys]
    assert len(set(amiss)) > 2
    assert [x for x in replies_of(first[-2:]) if x in amiss] == amiss[1::2]
    assert [x for x in replies_of(then) if x in amiss] == amiss[::2]
    assert not set(replies_of(first[:-2])) & set(amiss) - set(FILMLESS)


def test_unlike_suggestions_have_nothing_of_the_profile() -> None:
    draws = DRAWS
    found = 0
    for example in TRAIN:
        profile = profile_of(example, CATALOGUE)
        unlike = draws.unlike(example, profile, 3)
        for made in unlike:
            assert made.score == 0 and not telling_words(made.reply) & telling_words(profile)
            assert CATALOGUE.grade_of(made.reply, example.items) == 0
        assert len({made.reply for made in unlike}) == len(unlike) <= 4
        found += len(unlike)
    assert found > len(TRAIN)
    unknown = replace(TRAIN[0], items=("Lost Reel (1930)",), response="Try Lost Reel (1930).")
    assert draws.unlike(unknown, "Likes: crime.", 3) == []


def test_no_reply_that_names_a_target_is_worth_nothing_though_the_items_lack_it() -> None:
    known = TRAIN[0].items[0]
    response = f"Try {known} or Lost Reel (1930)."
    example = replace(TRAIN[0], items=(known, "Lost Reel (1930)"), response=response)
    assert DRAWS.unlike(example, "Likes: crime.", 3) == []
    made = [DRAWS.amiss(example, seed).reply for seed in range(30)]
    assert SILENCE in made and not any("Lost Reel" in reply for reply in made)


def test_a_film_is_as_popular_as_all_spellings_of_its_title() -> None:
    films = Catalogue(map(read_item, ({"name": "Heat (1995)"}, {"name": "Fargo (1996)"})))
    rows = [replace(TRAIN[0], items=(title,)) for title in ("Heat", "Heat (1995)", "Nobody")]
    assert popularity_of(rows, films) == {"Heat (1995)": 2, "Nobody": 1}


def test_lessons_lay_out_the_judges_as_they_are_asked_later() -> None:
    """A chat has the very messages of a judge's prompt, then comes the score."""
    example = TRAIN[0]
    (external,), (internal, *_) = simulator_lessons([example], DRAWS, 0, OPTIONS)
    plain = [Message(m.role, m.content) for m in external[0]]
    reply = (*example.history, Utterance("recommender", example.response))
    asked = external_judge_prompt(reply, str(example.explanation), example.items)
    assert tuple(plain) == (*asked, Message("assistant", "2"))
    plain = [Message(m.role, m.content) for m in internal[0]]
    asked = internal_judge_prompt(reply, str(example.profile))
    assert tuple(plain) == (*asked, Message("assistant", "2"))


def test_a_reaction_follows_the_reply_that_it_answers() -> None:
    """The external seeker accepts the gold reply, the inner one refuses the last reply judged."""
    example = TRAIN[0]
    (external,), (internal, *_) = simulator_lessons([example], DRAWS, 0, OPTIONS)
    accepted, refused = (
        Message("assistant", str(text), 0.5) for text in (example.accept, example.refuse)
    )
    assert ends(external)[-1] == (Message("user", example.response), accepted)
    assert ends(internal)[-1] == (scored(internal)[-1][0], refused)
    assert scored(internal)[-1][-1].content == "0"


def test_the_seeker_learns_its_own_lines_and_one_reply_is_worth_2() -> None:
    for part in simulator_lessons(TRAIN[:9], DRAWS, 0, OPTIONS):
        for lesson in part:
            prompts = [chat[: -len(end)] for chat, end in zip(lesson, ends(lesson), strict=True)]
            expected = [0.5 if m.role == "assistant" else 0 for m in prompts[0]]
            assert [m.weight for m in prompts[0]] == expected
            assert not any(m.weight for prompt in prompts[1:] for m in prompt)  # and once
            assert [end[-1].content for end in scored(lesson)].count("2") == 1


def test_one_dialogue_in_four_has_a_reply_without_a_film() -> None:
    """In its second lesson of the internal judge, and where the external judge meets it again.

    There every other dialogue has a kindred film instead.
    """
    _, then = simulator_lessons(TRAIN[:13], DRAWS, 0, OPTIONS)

    def filmless(lessons: Sequence[Lesson]) -> list[bool]:
        return [any(b[0].content in FILMLESS for b in scored(lesson)) for lesson in lessons]

    inner = [x for x in then if "targets" not in x[0][0].content]
    assert filmless(inner[::2]) == [False] * 11
    assert filmless(inner[1::2]) == [x % 4 == 0 for x in range(13) if x % 5 < 4]
    external = [x for x in then if "targets" in x[0][0].content]
    numbers = [x for x in range(13) if x % 2 == 0 or x % 6 == 1]  # the latter end with one amiss
    again = [x for number, x in zip(numbers, external, strict=True) if number % 2 == 0]
    assert filmless(again) == [x % 4 == 0 for x in range(0, 13, 2)]
    kindred = ["1" in [end[-1].content for end in scored(x)] for x in again]
    assert kindred == [x % 4 == 2 for x in range(0, 13, 2)]


def test_the_judges_learn_from_many_short_lessons() -> None:
    """Two replies for the external judge, then all; three, then the others for the internal one."""
    first, then = simulator_lessons(TRAIN[:1], DRAWS, 0, OPTIONS)
    key = seed_for(0, "lesson", TRAIN[0].dialog_id, TRAIN[0].turn_id)
    made, claimed = (DRAWS.draw(TRAIN[0], key, lies) for lies in (False, True))
    scores = [[end[-1].content for end in scored(lesson)] for lesson in first + then]
    assert scores == [["2", "0"], ["2", "0", "0"], ["2", "0", "0", "1", "0"], ["2", "0", "0"]]
    replies = [[end[0].content for end in scored(lesson)] for lesson in first + then]
    assert replies[-1] == [x.reply for x in claimed if x.score != 1]
    assert replies[0] == [x.reply for x in made if x.score != 1][:2]
    assert not set(replies[1][1:]) & set(replies[2][1:])
    # where all films are kindred, the other reply deserves 1
    films = Catalogue(read_item({"name": f"Film {x} (1995)", "genre": ["war"]}) for x in "ABC")
    row = Example("d", 1, (Utterance("seeker", "Hi"),), "See Film A (1995).", ("Film A (1995)",))
    first, _ = simulator_lessons([row], Suggestions(films, {"Film B (1995)": 1}), 0, OPTIONS)
    assert [[x[-1].content for x in scored(lesson)] for lesson in first] == [["2", "1"]]


def test_a_summary_is_asked_as_it_is_later_and_shares_its_system_prompt() -> None:
    options = LessonOptions(simulator_chats=2)
    lessons = summary_lessons(TRAIN[:3], CATALOGUE, options)
    assert [len(lesson) for lesson in lessons] == [2, 1]
    (*asked, told) = lessons[1][0]
    assert (*asked,) == summary_prompt(TRAIN[2].history)
    assert told == Message("assistant", str(TRAIN[2].profile), 1.0)


def card_chats(rehearsals: int = 8, cards: int = 12) -> list[tuple[Message, ...]]:
    """Return the chats that end with a score."""
    options = LessonOptions(cards=cards, rehearsals=rehearsals)
    lessons = card_lessons(TRAIN, DRAWS, 0, options)
    assert [len(x) for x in lessons[:-1]] == [4] * (len(lessons) - 1)
    return [chat for lesson in lessons for chat in with_score(lesson)]


def with_score(lesson: Lesson) -> list[Messages]:
    return [chat for chat in lesson if len(chat) == 5]


def test_after_every_other_scored_card_comes_another_without_a_score() -> None:
    lessons = card_lessons(TRAIN, DRAWS, 0, LessonOptions(cards=12, rehearsals=3))
    chats = [chat for lesson in lessons for chat in lesson]
    known = [x for x in chats if x[2].content != UNKNOWN]
    assert [len(x) for x in known] == [5, 5, 3] * 3 * 6
    films = [CATALOGUE.first(said.content)[0] for _, said, *_ in known]
    bare = films[2::3]
    assert all(map(ne, films[1::3], bare)) and len(set(bare)) > 6
    for film, chat in zip(bare, known[2::3], strict=True):
        assert chat[:2] == memory_prompt(announce(film.title))
        assert chat[2] == Message("assistant", card(film), 1.0)


def test_a_card_is_written_before_it_is_scored_by_rule_as_both_are_asked_later() -> None:
    told, claims = Counter[int](), Counter[int]()
    for system, said, shown, asked, answer in card_chats(16):
        prompt = (system, said, replace(shown, weight=0.0), asked)
        assert prompt == card_prompt(said.content, shown.content, asked.content)
        assert prompt[:2] == memory_prompt(said.content)
        assert (shown.weight, answer.weight) == (1.0, OPTIONS.score_weight)
        if shown.content == UNKNOWN:
            assert answer.content == "0" and not CATALOGUE.find(said.content)
            continue
        (film,) = CATALOGUE.first(said.content)
        assert shown.content == card(film)
        score, given = fit(film, read_profile(asked.content, CATALOGUE)), int(answer.content)
        assert given in (score, max(score - 1, 0))
        assert said.content != announce(film.title) or given == score
        told[given] += 1
        claims[score - given] += said.content != announce(film.title)
    assert min(told.values()) > 20 and len(told) == 3
    assert claims.total() == 4 * 12 and claims[1] > 5  # one of four; false of the film
    few = [said.content for _, said, shown, *_ in card_chats(2) if shown.content != UNKNOWN]
    claimed = [not said.startswith("I recommend ") for said in few]
    assert not any(claimed[:18]) and sum(claimed[18:]) > 3  # the last quarter, of any number


def test_each_of_the_most_frequent_titles_is_met_so_often_first_with_single_wishes() -> None:
    chats = [x for x in card_chats(8) if x[2].content != UNKNOWN]
    films = [CATALOGUE.first(said.content)[0] for _, said, *_ in chats]
    counts = sorted(DRAWS.shares, reverse=True)[:12]
    frequent = {film for film, x in zip(DRAWS.pool, DRAWS.shares, strict=True) if x > counts[-1]}
    assert frequent <= set(films) and set(Counter(films).values()) == {8} == {len(chats) // 12}
    rounds = [films[i : i + 12] for i in range(0, 96, 12)]
    assert all(len(set(x)) == 12 for x in rounds) and len(set(map(tuple, rounds))) == 8
    own = {(x.items[0], read_profile(str(x.profile), CATALOGUE)) for x in TRAIN}
    for number, (film, chat) in enumerate(zip(films, chats, strict=True)):
        facts = read_profile(chat[3].content, CATALOGUE)
        likes = [x for x in facts if x.attitude == "like" and x.kind != "title"]
        if number < 24:
            assert len(likes) == 1 and len(facts) <= 2
        else:  # all wishes that a film meets are taught of its own examples alone
            assert fit(film, facts) < 2 or (film.title, facts) in own


def test_the_seed_decides_which_profile_a_film_meets_first() -> None:
    def first_round(seed: int) -> dict[str, str]:
        lessons = card_lessons(TRAIN, DRAWS, seed, LessonOptions(cards=12, rehearsals=4))
        chats = [x for lesson in lessons for x in with_score(lesson) if x[2].content != UNKNOWN]
        return {said.content: asked.content for _, said, _, asked, _ in chats[:12]}

    one, other = first_round(0), first_round(1)
    assert one.keys() == other.keys() and one != other


def test_a_claim_that_leaves_the_film_open_is_not_scored() -> None:
    """ "Try Heat." said of a Night Ferry means either; "Try Heat (1995)." would mean one."""
    names = ("Heat (1995)", "Night Ferry (1950)", "Night Ferry (1990)")
    films = Catalogue(read_item({"name": name, "genre": ["crime"]}) for name in names)
    rows = [Example(x, 1, talk("Hi."), "Try Heat.", (x,)) for x in names]
    rows[1:] = [replace(x, response=f"Try {x.items[0]}.") for x in rows[1:]]
    options, draws = LessonOptions(rehearsals=32), Suggestions(films, popularity_of(rows, films))
    lessons = card_lessons(rows, draws, 0, options)
    chats = [x for lesson in lessons for x in with_score(lesson) if x[2].content != UNKNOWN]
    assert all(len(films.first(said.content)) == 1 for _, said, *_ in chats) and len(chats) == 96


def test_nothing_is_known_of_another_year_an_invented_title_and_none() -> None:
    strange = [x[1].content for x in card_chats(12, 30) if x[2].content == UNKNOWN]
    assert len(strange) == 12 * 4
    dated = [x for x in strange if x.startswith("I recommend ")]
    named = {item.name for item in CATALOGUE}
    assert all(x[len("I recommend ") : -len(" (1990).")] in named for x in dated)
    assert len(dated) > 20 and {SILENCE, *FILMLESS} & set(strange) and "" not in strange
    empty = [x == SILENCE for x in strange]
    turns = [set(empty[i : i + 4]) for i in range(4, 48, 8)]  # those without a year
    assert sum(len(x) == 2 for x in turns) > 2  # empty or not: each is a draw of its own
    films = Catalogue(read_item({"name": f"Film ({year})"}) for year in range(1960, 2030))
    rows = [replace(TRAIN[0], items=("Film (1990)",), response="Try Film (1990).")]
    options = LessonOptions(rehearsals=6)
    lessons = card_lessons(rows, Suggestions(films, popularity_of(rows, films)), 0, options)
    said = [x[1].content for lesson in lessons for x in lesson if x[2].content == UNKNOWN]
    assert len(said) == 6 and not any(map(films.find, said))  # every other year is a film here


def test_films_with_the_same_facts_are_taught_in_orders_of_their_own() -> None:
    names = ("Heat (1995)", "Casino (1995)")
    films = Catalogue(read_item({"name": x, "genre": ["crime", "war", "drama"]}) for x in names)
    met = profiles_to_score([], list(films), films, 0)
    assert len({tuple(map(tuple, single)) for single, _ in met.values()}) == 2
    assert met != profiles_to_score([], list(films), films, 1)


@pytest.mark.parametrize("film", [*CATALOGUE.named("Heat (1995)"), BARE])
def test_no_single_wish_is_refused_in_the_same_breath(film: Item) -> None:
    profiles = single_wishes(film, CATALOGUE, np.random.default_rng(0))
    refused = [{x.value for x in facts if x.attitude == "dislike"} for facts in profiles]
    wished = [{x.value for x in facts if x.attitude == "like"} for facts in profiles]
    assert any(refused) and not any(a & b for a, b in zip(wished, refused, strict=True))


def test_no_more_than_four_of_a_films_own_examples_are_scored() -> None:
    """The film meets half of their wishes, as it may of strangers'."""
    (film,) = CATALOGUE.named("Heat (1995)")
    own = Example("d", 1, talk("Hi."), "Try it.", (film.title,), "Likes: crime, 1950s.")
    rows = [replace(own, dialog_id=str(n)) for n in range(6)]
    assert len(profiles_to_score(rows, [film], CATALOGUE, 0)[film][1]) == 4


def test_near_misses_are_scored_beside_a_films_own_examples() -> None:
    (film,) = CATALOGUE.named("Heat (1995)")
    example = Example("d", 1, talk("Hi."), "Try Heat (1995).", (film.title,), "Likes: crime.")
    same = [replace(example, dialog_id=str(n)) for n in range(6)]
    single, several = profiles_to_score(same, [film], CATALOGUE, 0)[film]
    assert several == [read_profile("Likes: crime.", CATALOGUE)] * 4 and len(single) > 8
    stranger = replace(example, items=("Alien (1979)",), profile="Likes: 1990s.")  # as Heat is
    assert profiles_to_score([*same, stranger], [film], CATALOGUE, 0)[film][1] == several
    undated = [replace(x, items=("Heat",)) for x in same]  # as OpenDialKG names a film
    assert profiles_to_score(undated, [film], CATALOGUE, 0)[film][1] == several
    texts = ("western, war, family", "crime, war, family", "crime, war")  # meets none, 1 and half
    far, near, half = (read_profile(f"Likes: {text}.", CATALOGUE) for text in texts)
    rng = np.random.default_rng(0)
    assert mixed([far, near, half], film, 2, rng) == [half, near]


def test_a_claim_is_false_only_of_films_that_it_does_not_fit() -> None:
    old, new = (CATALOGUE.get(x) for x in ("Alien (1979)", "Heat (1995)"))
    assert old and new
    text = "Try Alien (1979), a horror film."
    assert claim_of(text, [old], new) == ("Try Heat (1995), a horror film.", True)
    assert claim_of("Try Alien (1979).", [old], new) == ("Try Heat (1995).", False)


def test_a_told_profile_has_the_order_of_the_gold_ones() -> None:
    """A set of facts has no order of its own: it differs from process to process."""
    text = "Likes: crime, war, tense mood, 1990s, by Michael Mann, with Al Pacino."
    text += " Dislikes: drama, Up (2009). Seen: Alien (1979)."
    assert told(read_profile(text, CATALOGUE)) == text


def test_woven_lists_keep_their_order_and_are_spread_evenly() -> None:
    a, b = ([[(Message("user", f"{x}{i}"),)] for i in range(n)]
            for x, n in (("a", 4), ("b", 2)))  # fmt: skip
    assert [x[0][0].content for x in woven(a, b)] == ["a0", "b0", "a1", "a2", "b1", "a3"]
    assert [x[0][0].content for x in woven(a[:3], b[:1])] == ["a0", "a1", "b0", "a2"]


def test_the_external_judge_is_learned_first() -> None:
    first, then = simulator_lessons(TRAIN, DRAWS, 0, OPTIONS)
    kinds = [["targets" in x[0][0].content for x in part] for part in (first, then)]
    silent = len(range(1, len(TRAIN), 6)), len(range(4, len(TRAIN), 6))
    assert all(kinds[0]) and len(first) == len(TRAIN) - silent[0] + silent[1]
    assert sum(kinds[1]) == silent[0] + len(TRAIN[::2])
    inner = sum(number % 5 < 4 for number in range(len(TRAIN)))
    assert len(then) - sum(kinds[1]) == 2 * inner


def test_the_same_seed_makes_the_same_lessons_whatever_the_neighbours() -> None:
    once = simulator_lessons(TRAIN[:1], DRAWS, 5, OPTIONS)
    more = simulator_lessons(TRAIN[:4], DRAWS, 5, OPTIONS)
    assert once[0][0] == more[0][0]
    assert once != simulator_lessons(TRAIN[:1], DRAWS, 6, OPTIONS)


def test_a_dataset_without_profiles_gets_one_from_what_the_seeker_named() -> None:
    said = Utterance("seeker", "I like a good horror film such as Alien (1979).")
    example = Example("d", 1, (said,), "Try Psycho (1960).", ("Psycho (1960)",))
    profile = profile_of(example, CATALOGUE)
    assert profile.startswith("Likes: horror") and profile.endswith("Alien (1979).")
    assert "Psycho" not in profile
    four = ("Alien (1979)", "Heat (1995)", "Titanic (1997)", "Up (2009)")
    example = replace(example, history=talk(f"I saw {', '.join(four)}."))
    *genres, second, third, fourth = profile_of(example, CATALOGUE)[len("Likes: ") : -1].split(", ")
    assert [second, third, fourth] == [*four[1:]] and len(genres) == 4


def test_such_a_profile_has_the_words_of_the_cards() -> None:
    said = Utterance("seeker", "I liked Titanic (1997).")
    example = Example("d", 1, (said,), "Try Psycho (1960).", ("Psycho (1960)",))
    titanic = CATALOGUE.get("Titanic (1997)")
    assert titanic is not None and "romance" in titanic.genres
    assert fit(titanic, read_profile(profile_of(example, CATALOGUE), CATALOGUE)) == 2
    silent = replace(example, history=(Utterance("seeker", "Hello!"),))
    assert read_profile(profile_of(silent, CATALOGUE), CATALOGUE) == frozenset()


def test_few_facts_and_many_titles_a_row_make_card_lessons_too() -> None:
    """All films are of one decade, and of no other fact; a row recommends four of six."""
    films = Catalogue(read_item({"name": f"Film {x} (1995)"}) for x in "ABCDEF")
    titles = tuple(x.title for x in films)
    row = Example("d", 1, (Utterance("seeker", "Hi"),), ", ".join(titles[:4]), titles[:4])
    rows = [row, replace(row, items=titles[2:])]
    draws = Suggestions(films, popularity_of(rows, films))
    (lesson,) = card_lessons(rows, draws, 0, LessonOptions(rehearsals=1, simulator_chats=16))
    assert len(lesson) == 6 + 3 + 1
    bare = Catalogue(read_item({"name": f"Film {x}"}) for x in "ABC")  # nothing to know
    rows = [replace(row, items=("Film A",))]
    assert (
        card_lessons(rows, Suggestions(bare, popularity_of(rows, bare)), 0, LessonOptions()) == []
    )
    assert card_lessons([], draws, 0, LessonOptions()) == []


def test_one_dialogue_in_so_many_teaches_to_explain() -> None:
    options = LessonOptions(explain_every=4, sft_chats=1)
    lessons = recommender_lessons(TRAIN[:9], [], CATALOGUE, options)
    explained = [Message("user", EXPLAIN) in lesson[0] for lesson in lessons]
    assert explained == [i % 4 == 0 for i in range(len(lessons))]


def pairs_in(chat: Messages) -> set[tuple[str, frozenset[Fact]]]:
    """Every (title, wishes) of a chat: the titles of its replies, the wishes of its profile."""
    before, _, after = prompt_text("judge_internal").partition("{profile}")
    profiles = [x.content.removeprefix(before).removesuffix(after) for x in chat]
    wishes = {read_profile(x, CATALOGUE) for x in profiles if x.startswith("Likes: ")}
    replies = [x.content for x in chat if not x.content.startswith("Likes: ")] if wishes else []
    titles = {x.title for text in replies for found in CATALOGUE.find(text) for x in found.items}
    return {(title, facts) for title in titles for facts in wishes}


def test_no_lesson_holds_what_a_held_out_row_asks() -> None:
    """Neither a (film, wishes) pair of valid or test, nor one of their dialogues."""
    held = [x for split in ("valid", "test") for x in load_split("sample", split).examples]
    asked = {(t, read_profile(str(x.profile), CATALOGUE)) for x in held for t in x.items}
    said = {tuple(line.text for line in x.history) for x in held}
    said |= {(format_dialogue(x.history),) for x in held}  # as the summariser reads them
    rows = sorted(load_split("sample", "train").examples, key=lambda x: seed_for(x.dialog_id))
    draws = Suggestions(CATALOGUE, popularity_of(rows, CATALOGUE))
    first, then = simulator_lessons(rows[:60], draws, 0, OPTIONS)
    kinds = [
        recommender_lessons(rows[:100], rows[100:1000], CATALOGUE, OPTIONS),
        first + then,
        summary_lessons(rows[:200], CATALOGUE, OPTIONS),
        card_lessons(rows[:1200], draws, 0, OPTIONS),
    ]
    pairs, dialogues = [], []
    for lessons in kinds:
        chats = [chat for lesson in lessons for chat in lesson]
        pairs.append({pair for chat in chats for pair in pairs_in(chat)})
        texts = [tuple(x.content for x in chat[1:]) for chat in chats]
        dialogues.append({x[:n] for x in texts for n in range(1, len(x) + 1)})
    assert all(pairs) and [len(asked & x) for x in pairs] == [0] * 4
    assert [len(said & x) for x in dialogues] == [0] * 4
    (chat,), (log,) = recommender_lessons(held[:1], held[:1], CATALOGUE, OPTIONS)[0][1:], [held[0]]
    assert len(asked & pairs_in(chat)) == 1
    assert (summary_lessons([log], CATALOGUE, OPTIONS)[0][0][1].content,) in said
