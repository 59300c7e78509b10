"""Over-long conversations: whole turns go, from the left, the same in training and inference."""

import pytest

from usbrec.chat import Lesson, Message
from usbrec.llm.limits import REPLY_ROOM, fit_lesson, fit_prompt, prompt_room, shorten
from usbrec.llm.objectives import longest_path, pair_tree, usable_lessons, usable_pairs
from usbrec.llm.packing import lesson_tree
from usbrec.llm.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def ours(default_model_folder):
    return ChatTokenizer.from_folder(default_model_folder)


def numbered_chat(turns, weight=0.0):
    chat = [Message("system", "Be brief.")]
    for number in range(turns):
        chat.append(Message("user", f"question {number}"))
        chat.append(Message("assistant", f"reply {number}", weight))
    return chat


def limit_for(tokens):
    """The limit that leaves a prompt so many tokens: 30 for 40, as a quarter is the reply's."""
    return next(n for n in range(10_000) if prompt_room(n) == tokens)


def test_whole_turns_go_and_the_system_prompt_and_the_last_turn_stay(ours):
    chat = numbered_chat(5)[:-1]
    length = len(ours.prompt(chat))
    assert shorten(ours, chat, length) == chat
    kept = shorten(ours, chat, length - 1)
    assert kept == chat[:1] + chat[3:]
    assert len(ours.prompt(kept)) <= length - 1
    assert shorten(ours, chat, 1) == [chat[0], chat[-1]]


def test_what_follows_the_last_user_turn_stays(ours):
    question = Message("system", "How good was it? 0, 1 or 2.")
    chat = [Message("assistant", "Welcome!"), *numbered_chat(2)[1:-1], question]
    assert shorten(ours, chat, 1) == chat[-2:]


def test_a_log_loses_its_oldest_lines_and_a_single_line_is_never_cut(ours):
    log = Message("user", "\n".join(f"Seeker: line {i}" for i in range(20)))
    chat = [Message("system", "Summarise."), log]
    kept = shorten(ours, chat, len(ours.prompt(chat)) - 30)
    assert kept[0] == chat[0]
    assert log.content.endswith(kept[1].content) and kept[1].content.startswith("Seeker: line ")
    assert len(ours.prompt(chat)) - 45 < len(ours.prompt(kept)) <= len(ours.prompt(chat)) - 30
    assert shorten(ours, chat, 1)[1].content == "Seeker: line 19"
    assert shorten(ours, chat[:1], 1) == chat[:1]


def test_a_reply_has_room_of_its_own(ours):
    assert prompt_room(8192) == 8192 - REPLY_ROOM
    assert prompt_room(100) == 75
    chat = numbered_chat(3)[:-1]
    length = len(ours.prompt(chat))
    assert fit_prompt(ours, chat, length) == (ours.prompt(chat), False)
    ids, was_shortened = fit_prompt(ours, chat, length - 1)
    assert was_shortened and ids == ours.prompt(chat[:1] + chat[3:])


@pytest.mark.parametrize("family", ["trunk", "branches"])
def test_every_learned_reply_follows_the_prompt_that_inference_reads(ours, family):
    """Whatever the limit, each reply is learned once, after exactly the ids of its prompt."""
    chat = numbered_chat(6, weight=1.0)
    lesson = Lesson(tuple(chat))
    if family == "branches":
        explained = (Message("user", "Why?"), Message("assistant", "Since it is.", 2.0))
        scored = (
            Message("user", "So?"),
            Message("system", "Score?"),
            Message("assistant", "1", 3.0),
        )
        lesson = Lesson(tuple(chat), (explained, scored))
    paths = [chat, *([*chat, *branch] for branch in lesson.branches)]
    wanted = {
        message.content: [*chat_before]
        for path in paths
        for i, message in enumerate(path)
        if message.weight
        for chat_before in [path[:i]]
    }
    whole = longest_path(lesson_tree(ours, lesson))
    for room in range(30, whole + 2, 7):
        limit = limit_for(room)
        learned = {}
        for piece in fit_lesson(ours, lesson, limit):
            tree = lesson_tree(ours, piece)
            assert longest_path(tree) <= limit
            for ids, reply in learned_replies(ours, tree):
                assert reply not in learned
                learned[reply] = ids
        assert learned == {
            reply: fit_prompt(ours, before, room)[0] for reply, before in wanted.items()
        }


def learned_replies(tokenizer, tree):
    """Return (ids before it, text) for every run of supervised tokens of a tree."""
    found = []
    for branch in tree.branches:
        past = [] if branch.parent is None else list(tree.branches[branch.parent].ids)
        run = []
        for place, (token, weight) in enumerate(zip(branch.ids, branch.weights, strict=True)):
            if weight:
                run.append(token)
            if run and (not weight or place + 1 == len(branch.ids)):
                stop = place + (1 if weight else 0)
                before = past + list(branch.ids[: stop - len(run)])
                found.append((before, tokenizer.decode(run)))
                run = []
    return found


def test_a_lesson_that_fits_is_left_as_it_is(ours):
    lesson = Lesson(tuple(numbered_chat(3, weight=1.0)))
    room = longest_path(lesson_tree(ours, lesson))
    assert fit_lesson(ours, lesson, limit_for(room)) == [lesson]
    assert fit_lesson(ours, lesson, limit_for(room - 8)) != [lesson]


def test_a_prompt_as_long_as_the_limit_and_a_reply_beyond_it_are_dropped_and_counted(ours):
    """No reply is ever cut: not to nothing, and not to a beginning that nobody wrote."""
    question, reply = Message("user", "why " * 30), Message("assistant", "so " * 30, 1.0)
    fits = Lesson((Message("user", "why"), Message("assistant", "so", 1.0)))
    lessons = [fits, Lesson((question, reply)), Lesson((fits.trunk[0], reply))]
    trees = [lesson_tree(ours, p) for x in lessons for p in fit_lesson(ours, x, 50)]
    kept, dropped = usable_lessons(trees, 50)
    assert kept == [lesson_tree(ours, fits)]
    assert dropped["dropped as too long"] == len(trees) - 1 >= 1
    long, short = ours.reply("so " * 30), ours.reply("so")
    prompt, _ = fit_prompt(ours, [question], 50)
    pairs = [
        pair_tree(ours.prompt(fits.trunk[:1]), long, short),
        pair_tree(prompt, short, ours.reply("no")),
        pair_tree(ours.prompt(fits.trunk[:1]), short, ours.reply("")),
        pair_tree(ours.prompt(fits.trunk[:1]), short, short),
    ]
    kept, dropped = usable_pairs(pairs, 50)
    assert not kept
    assert list(dropped.values()) == [2, 1, 1]
