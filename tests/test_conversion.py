"""Datasets from elsewhere: downloads, other formats, files of chats, and what `check` finds."""

import csv
import hashlib
import json
import re
import resource
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from small_run import STAGE_FLAGS, flags, write_small_model

import infer
import train
from usbrec.crs import conversion, datasets
from usbrec.crs.catalogue import Catalogue, read_item
from usbrec.crs.datasets import SPLITS, load_catalogue, load_split
from usbrec.crs.titles import written_titles
from usbrec.crs.wishes import card
from usbrec.options import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED}")
KNOWN = conversion.KNOWN
FILES = {f"{name}.jsonl": f"{name} row\n".encode() * 9000 for name in SPLITS}
FILES["items.json"] = b"{}"


def git_checksum(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def write_lines(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path


def rows_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    texts = {split: (folder / f"{split}.jsonl").read_text("utf-8") for split in SPLITS}
    return {split: list(map(json.loads, text.splitlines())) for split, text in texts.items()}


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Return the exit code of a command, and what it wrote to both streams."""
    code = conversion.main(list(map(str, words)))
    return code, *capsys.readouterr()


# --- downloads --------------------------------------------------------------------------------


class Source(ThreadingHTTPServer):
    """A server of FILES, and its faults: bytes after which it hangs up, ranges it ignores."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = dict(FILES), list[tuple[str, str]]()
        self.hangs_up_after, self.knows_ranges = 10**9, True


class Handler(BaseHTTPRequestHandler):
    server: Source

    def do_GET(self) -> None:
        name, wanted = self.path.strip("/"), self.headers["Range"]
        self.server.asked.append((name, wanted))
        content = self.server.files.get(name)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if self.server.knows_ranges else 0
        if content is None or start >= len(content):
            self.send_error(404 if content is None else 416)
            return
        self.send_response(206 if self.server.knows_ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.hangs_up_after])

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """The server, whose files take the place of ReDial's."""
    server = Source()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    place = f"http://127.0.0.1:{server.server_port}"
    own = {name: [f"{place}/{name}", git_checksum(x)] for name, x in FILES.items()}
    monkeypatch.setitem(KNOWN, "sources", {"redial": own})
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_files_are_fetched_once_with_a_bar(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "redial"
    code, out, err = run(capsys, "fetch", "redial", "--data-dir", folder)
    assert code == 0 and out.count("the checksum is right") == 4 and "train.jsonl" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    source.asked.clear()
    assert run(capsys, "fetch", "redial", "--data-dir", folder)[0] == 0
    assert source.asked == []


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_an_interrupted_download_goes_on(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], knows_ranges: bool
) -> None:
    source.hangs_up_after, source.knows_ranges = 70_000, knows_ranges
    code, _, err = run(capsys, "fetch", "redial", "--data-dir", tmp_path)
    size = len(FILES["train.jsonl"])
    assert code == 2 and f"ended after 70000 of {size} bytes; the same command goes on" in err
    assert (tmp_path / "train.jsonl.part").stat().st_size == 70_000
    assert not (tmp_path / "train.jsonl").exists()
    source.hangs_up_after = 10**9
    source.asked.clear()
    assert run(capsys, "fetch", "redial", "--data-dir", tmp_path)[0] == 0
    assert source.asked[0] == ("train.jsonl", "bytes=69999-")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES


def test_a_part_that_is_whole_becomes_the_file(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl.part").write_bytes(FILES["train.jsonl"])
    assert run(capsys, "fetch", "redial", "--data-dir", tmp_path)[0] == 0
    assert (tmp_path / "train.jsonl").read_bytes() == FILES["train.jsonl"]


def test_a_wrong_checksum_leaves_no_file(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.files["train.jsonl"] = b"Sign in to the network" * 99
    code, _, err = run(capsys, "fetch", "redial", "--data-dir", tmp_path)
    assert code == 2 and "has not the checksum of http" in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_ones_own_is_never_overwritten(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text("mine")
    code, _, err = run(capsys, "fetch", "redial", "--data-dir", tmp_path)
    assert code == 2 and f"{tmp_path / 'train.jsonl'} has not the checksum" in err
    assert (tmp_path / "train.jsonl").read_text() == "mine" and source.asked == []


def test_a_file_that_the_server_lacks_and_no_network_are_one_sentence(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del source.files["valid.jsonl"]
    code, _, err = run(capsys, "fetch", "redial", "--data-dir", tmp_path)
    assert code == 2 and "valid.jsonl.part: HTTP Error 404: Not Found; the same" in err
    source.shutdown()
    source.server_close()
    code, _, err = run(capsys, "fetch", "redial", "--data-dir", tmp_path)
    assert code == 2 and "Connection refused" in err and err.count("\n") == 1


def test_a_full_disk_is_one_sentence_and_the_download_goes_on(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit of a file's size stands for the disk's."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code, _, err = run(capsys, "fetch", "redial", "--data-dir", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "train.jsonl.part: [Errno 27] File too large; the same command" in err
    assert run(capsys, "fetch", "redial", "--data-dir", tmp_path)[0] == 0
    assert (tmp_path / "train.jsonl").read_bytes() == FILES["train.jsonl"]


def test_the_sources_are_files_of_one_commit() -> None:
    for name, files in KNOWN["sources"].items():
        assert list(files) == [*(f"{split}.jsonl" for split in SPLITS), "items.json"]
        for url, checksum in files.values():
            assert re.fullmatch(r"https://[\w./-]+/iEvaLM-CRS/[0-9a-f]{40}/data/[\w./]+", url)
            assert name in url and re.fullmatch("[0-9a-f]{40}", checksum)


@needs_shared
def test_the_checksums_are_those_of_the_files() -> None:
    known = {"redial": {"valid", "test", "items"}, "opendialkg": {*SPLITS, "items"}}
    for name, files in KNOWN["sources"].items():
        for file, (_, checksum) in files.items():
            if file.partition(".")[0] in known[name]:
                assert git_checksum((SHARED / name / file).read_bytes()) == checksum


# --- formats ----------------------------------------------------------------------------------


def redial(number: int, **changed: Any) -> dict[str, Any]:
    """A dialogue in the shape of ReDial's release: the seeker is the initiator."""
    lines = [
        (5, "Hi! Is it @13?"),
        (7, "I &amp; my cat like @11"),
        (5, "Try @12"),
        (5, "and @13!"),
    ]
    return {
        "movieMentions": {
            "11": "Alien  (1979)",
            "12": "Heat (1995)",
            "13": "Up (2009)",
            "14": None,
        },
        "respondentQuestions": {},
        "messages": [
            {"timeOffset": n, "text": text, "senderWorkerId": who, "messageId": n}
            for n, (who, text) in enumerate(lines)
        ],
        "conversationId": number,
        "respondentWorkerId": 5,
        "initiatorWorkerId": 7,
        "initiatorQuestions": {},
        **changed,
    }


def test_redials_release_becomes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = redial(99, movieMentions=[], messages=[])
    write_lines(tmp_path / "in" / "train_data.jsonl", *map(redial, range(20)), silent)
    write_lines(tmp_path / "in" / "test_data.jsonl", redial(50))
    code, out, _ = run(capsys, "convert", "redial", tmp_path / "in", tmp_path / "out")
    rows = rows_in(tmp_path / "out")
    assert code == 0 and "train: 18 rows of 18 dialogues\nvalid: 2 rows of 2" in out
    assert rows["test"] == [
        {
            "dialog_id": "50",
            "turn_id": 2,
            "context": ["Hi! Is it Up (2009)?", "I & my cat like Alien (1979)"],
            "rec": ["Heat (1995)", "Up (2009)"],
            "resp": "Try Heat (1995) and Up (2009)!",
        }
    ]
    assert load_split(str(tmp_path / "out"), "test").examples[0].history[0].speaker == "recommender"
    assert [x.title for x in load_catalogue(str(tmp_path / "out"))] == [
        "Alien (1979)", "Heat (1995)", "Up (2009)"
    ]  # fmt: skip


def test_escaped_names_are_read_in_texts_and_as_titles(tmp_path: Path) -> None:
    films = {"11": "Alien (1979)", "12": "Heat &amp; Dust (1983)", "13": "Up (2009)"}
    write_lines(tmp_path / "in" / "train_data.jsonl", *map(redial, range(3)))
    write_lines(tmp_path / "in" / "test_data.jsonl", redial(50, movieMentions=films))
    list(conversion.convert("redial", str(tmp_path / "in"), str(tmp_path / "out"), None, "0"))
    (row,) = rows_in(tmp_path / "out")["test"]
    assert row["rec"] == ["Heat & Dust (1983)", "Up (2009)"]
    assert row["resp"] == "Try Heat & Dust (1983) and Up (2009)!"


@needs_shared
def test_redials_raw_dialogues_become_ievalms_rows(tmp_path: Path) -> None:
    """iEvaLM lacks rows before the first mention, and some films of a line."""
    raw = str(SHARED / "redial" / "valid_raw.jsonl")
    list(conversion.convert("redial", raw, str(tmp_path / "out"), None, "0"))
    ours = {
        (row["dialog_id"], row["resp"], *row["rec"])
        for rows in rows_in(tmp_path / "out").values()
        for row in rows
    }
    lines = (SHARED / "redial" / "valid.jsonl").read_text("utf-8").splitlines()
    theirs = {(x["dialog_id"], x["resp"], *x["rec"]) for x in map(json.loads, lines)}
    assert len(theirs - ours) < 10 and len(theirs) > 2700


INSPIRED = ("dialog_id", "utt_id", "speaker", "turn_id", "text", "movies")


def write_inspired(path: Path, *names: str) -> None:
    lines = [
        ("RECOMMENDER", "Hello", ""),
        ("SEEKER", "Something like QUOTATION_MARKAlienQUOTATION_MARK", "Alien (1979)"),
        ("RECOMMENDER", 'Heat and "Up"', "Heat (1995);  Up (2009); Heat (1995)"),
        ("RECOMMENDER", "are good", ""),
    ]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file, "excel-tab")
        table.writerow(INSPIRED)
        for name in names:
            table.writerows((name, n, who, n, text, x) for n, (who, text, x) in enumerate(lines))


def test_inspireds_tables_become_rows(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "dev", "test")):
        write_inspired(tmp_path / "dialog_data" / f"{name}.tsv", f"{number}_live.pkl")
    list(conversion.convert("inspired", str(tmp_path), str(tmp_path / "out"), None, "0"))
    rows = rows_in(tmp_path / "out")
    assert [rows[split][0]["dialog_id"][0] for split in SPLITS] == ["0", "1", "2"]
    assert rows["valid"][0]["context"] == ["Hello", 'Something like "Alien"']
    assert rows["valid"][0]["rec"] == ["Heat (1995)", "Up (2009)"]
    assert rows["valid"][0]["resp"] == 'Heat and "Up" are good'


def test_opendialkgs_table_becomes_rows_of_the_titles_of_the_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = [0.9, [["Heat", "directed_by", "Michael Mann"]], "Heat is directed by Michael Mann"]
    step = {"type": "action", "sender": "assistant", "action_id": "kgwalk/choose_path"}
    actions = [
        {"type": "chat", "sender": "user", "message": 'Who made "Heat"?'},
        {**step, "metadata": {"path": path}},
        {"type": "chat", "sender": "assistant", "message": "Michael Mann, as The Insider.\nOK?"},
        {"type": "chat", "sender": "user", "message": "Thanks"},
    ]
    with (tmp_path / "opendialkg.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("Messages", "User Rating", "Assistant Rating"))
        table.writerows((json.dumps(actions), 5, 4) for _ in range(3))
    items = tmp_path / "items.json"
    items.write_text(json.dumps({"7": {"name": "The Insider", "genre": ["drama"]}}))
    words = ("convert", "opendialkg", tmp_path / "opendialkg.csv", tmp_path / "out")
    assert run(capsys, *words, "--items", items)[0] == 0
    rows = rows_in(tmp_path / "out")
    assert [len(rows[split]) for split in SPLITS] == [1, 1, 1]
    assert rows["train"][0]["rec"] == ["The Insider"]
    assert rows["train"][0]["resp"] == "Michael Mann, as The Insider.\nOK?"
    assert (tmp_path / "out" / "items.json").read_text() == items.read_text()


@pytest.mark.parametrize("dialog", ["dialog", "messages"])
def test_crslabs_dialogues_become_rows(tmp_path: Path, dialog: str) -> None:
    """Words or texts, links or titles, and three names for the items."""
    lines = [
        {"role": "Seeker", "text": ["I", "do", "n't", "know", "@1", "."], "movies": ["Up (2009)"]},
        {
            "role": "Recommender",
            "text": ["Try", "@2", ",", "or", "@3", "!"],
            "movies": [f"<http://dbpedia.org/r/{x}>" for x in ("Heat_(1995_film)", "L%C3%A9on")],
        },
        {"role": "Seeker", "text": "No", "item": []},
        {"role": "Recommender", "text": "Then Alien @9", "movie": []},
        {"role": "Seeker", "text": ["看", "过", "了", "吗"], "item": []},
        {"role": "Recommender", "text": "Alien, then", "item": ["Alien"]},
    ]  # fmt: skip
    for split in SPLITS:
        chats = [{"conv_id": 1, dialog: lines}]
        (tmp_path / f"{split}_data.json").write_text(json.dumps(chats), "utf-8")
    list(conversion.convert("crslab", str(tmp_path), str(tmp_path / "out"), None, "0"))
    first, second = rows_in(tmp_path / "out")["train"]
    assert first["context"] == ["I don't know Up (2009)."]
    assert first["resp"] == "Try Heat (1995 film), or Léon!"
    assert first["rec"] == ["Heat (1995 film)", "Léon"]
    assert second["context"][2:] == ["No", "Then Alien @9", "看过了吗"]
    assert second["rec"] == ["Alien"]
    heat = load_catalogue(str(tmp_path / "out")).get("Heat (1995)")
    assert heat is not None and heat.year == 1995


def chat(number: int, *titles: str, mark: bool = False) -> dict[str, Any]:
    said = [{"role": "user", "content": f"I have {number} cats. A film?"}]
    for title in titles:
        marks = {"items": [title]} if mark else {}
        said += [{"role": "assistant", "content": f"Try {title}.", **marks}]
        said += [{"role": "user", "content": "Seen it."}]
    return {"id": f"talk {number}", "messages": said}


def test_dialogues_without_names_are_other_ones_in_another_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in SPLITS:
        chats = (chat(n, f"Heat ({n})")["messages"] for n in range(1990, 1994))
        write_lines(tmp_path / "in" / f"{split}.jsonl", *chats)
    assert run(capsys, "convert", "chats", tmp_path / "in", tmp_path / "out")[0] == 0
    code, out, _ = run(capsys, "check", tmp_path / "out")
    assert code == 0 and "4 rows of 4 dialogues" in out and "dialogues of both" not in out


def test_a_dialogue_whose_name_is_null_has_none(tmp_path: Path) -> None:
    chats = ({**chat(n, f"Heat ({n})"), "id": None} for n in range(1990, 2000))
    path = write_lines(tmp_path / "in.jsonl", *chats)
    list(conversion.convert("chats", str(path), str(tmp_path / "out"), None, "0"))
    rows = [row for part in rows_in(tmp_path / "out").values() for row in part]
    assert {row["dialog_id"] for row in rows} == set(map(str, range(1, 11)))


def test_what_has_no_splits_is_divided_by_dialogue_with_a_seed(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl", *(chat(n, "Heat (1995)", "Up (2009)") for n in range(40))
    )
    made = {}
    for name, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        list(conversion.convert("chats", str(path), str(tmp_path / name), None, seed))
        made[name] = {x.name: x.read_bytes() for x in (tmp_path / name).iterdir()}
    assert made["one"] == made["again"] != made["other"]
    ids = [{row["dialog_id"] for row in rows} for rows in rows_in(tmp_path / "one").values()]
    assert [len(x) for x in ids] == [32, 4, 4] and len(set.union(*ids)) == 40


def test_rows_whose_titles_the_items_lack_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [chat(n, "Heat (1995)", "Nobody (1900)", mark=True) for n in range(4)]
    path, items = write_lines(tmp_path / "in.jsonl", *chats), tmp_path / "items.json"
    items.write_text(json.dumps({"1": {"name": "Heat (1995)"}}))
    code, out, _ = run(capsys, "convert", "chats", path, tmp_path / "out", "--items", items)
    assert (
        code == 0 and "4 dialogues have 8 turns that recommend a title; 4 of them are left" in out
    )
    assert sum(map(len, rows_in(tmp_path / "out").values())) == 4


NAMELESS = '{"initiatorWorkerId": 1, "respondentWorkerId": 2, "movieMentions": ["abc"]}'


@pytest.mark.parametrize(
    ("form", "name", "text", "fault"),
    [
        ("redial", "a.jsonl", '{"messages": []}', "not in the format redial: KeyError"),
        ("redial", "a.jsonl", "[1]", "not in the format redial: TypeError"),
        ("redial", "a.jsonl", "{", "a.jsonl, line 1: not JSON"),
        ("redial", "a.jsonl", NAMELESS, "not in the format redial: AttributeError"),
        ("inspired", "a.tsv", "a\tb\n1\t2\n", "not in the format inspired: KeyError"),
        ("opendialkg", "a.csv", "Messages\n{}x\n", "not JSON"),
        ("opendialkg", "a.csv", "Messages\n" + "x" * 140_000, "field larger than field limit"),
        ("crslab", "a.json", '[{"dialog": [{"text": "x"}]}]', "KeyError('role')"),
        ("crslab", "a.json", '[{"dialog": [{"text": "x", "role": "Bot"}]}]', "needs a role"),
        ("chats", "a.jsonl", '{"lines": []}', "a.jsonl, line 1: expected a list of messages"),
        ("chats", "a.jsonl", "[]", "0 turns that recommend a title"),
        ("chats", "b.jsonl", "[]", "a.jsonl is missing"),
    ],
)
def test_a_source_of_another_form_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, name: str, text: str, fault: str
) -> None:
    (tmp_path / name).write_text(text)
    source = tmp_path / ("a.jsonl" if name == "b.jsonl" else name)
    code, _, err = run(capsys, "convert", form, source, tmp_path / "out")
    assert code == 2 and fault in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_several_datasets_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is chosen silently, nor are one's training and the other's test dialogues mixed."""
    for name in ("a/train.jsonl", "a/test.jsonl", "b/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, *(chat(n, "Heat (1995)") for n in range(3)))
    code, _, err = run(capsys, "convert", "chats", tmp_path, tmp_path / "out")
    assert code == 2 and f"name one, {tmp_path / 'a' / 'train.jsonl'}" in err
    assert run(capsys, "convert", "chats", tmp_path / "a", tmp_path / "out")[0] == 0


def test_a_folder_that_exists_is_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "in.jsonl", *(chat(n, "Heat (1995)") for n in range(3)))
    code, _, err = run(capsys, "convert", "chats", path, tmp_path)
    assert code == 2 and "File exists" in err
    assert sorted(tmp_path.iterdir()) == [path]


# --- files of chats ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ('Try Heat (1995) or "Up".', ["Heat (1995)", "Up"]),
        ("**Dune** (1965), or “A Wizard of Earthsea”!", ["Dune (1965)", "A Wizard of Earthsea"]),
        ("Sure! Mr. & Mrs. Smith (2005)", ["Mr. & Mrs. Smith (2005)"]),
        ("See Alien: Covenant (2017), Jaws! (1975)", ["Alien: Covenant (2017)", "Jaws! (1975)"]),
        ("我推荐《春江花月》(2019)和《火》", ["春江花月 (2019)", "火"]),
        ('She said "That is fine." and "ok"; it is *very* good in (1999)', []),
    ],
)  # fmt: skip
def test_titles_are_read_from_quotes_and_years(text: str, titles: list[str]) -> None:
    assert written_titles(text) == titles


@pytest.mark.parametrize("words", ["The ", "Aa: ", "Aa - ", '"A', "A-", "A'", "__", "**"])
def test_a_long_text_that_names_no_year_holds_no_title(words: str) -> None:
    """With titles of any length this would take minutes."""
    assert written_titles(words * 25_000) == []


def test_a_file_of_chats_is_a_dataset_with_a_catalogue_of_its_titles(tmp_path: Path) -> None:
    chats: list[Any] = [chat(n, "Heat (1995)", '"Alien"', "Alien (1979)") for n in range(10)]
    chats[3]["messages"].insert(0, {"role": "system", "content": 'You are "Max".'})
    path = str(write_lines(tmp_path / "ten.jsonl", *chats, chats[4]["messages"], chat(98)))
    assert [x.title for x in load_catalogue(path)] == ["Alien (1979)", "Heat (1995)"]
    parts = {split: load_split(path, split) for split in SPLITS}
    ids = [{x.dialog_id for x in part.examples} for part in parts.values()]
    assert (
        [len(x) for x in ids] == [9, 1, 1]
        and len(set.union(*ids)) == 11
        and "11" in set.union(*ids)
    )
    example = parts["test"].examples[0]
    assert example.items == ("Heat (1995)",) and example.response == "Try Heat (1995)."
    assert parts["train"].notes[0].startswith("12 dialogues have 33 turns that recommend a title")
    assert parts == {split: load_split(path, split) for split in SPLITS}


def test_dialogues_of_a_file_that_stand_in_it_twice_are_told(tmp_path: Path) -> None:
    """Under numbers of their own, by which they are divided."""
    twice = [chat(n % 20, f"Heat ({1950 + n % 20})")["messages"] for n in range(40)]
    path = str(write_lines(tmp_path / "twice.jsonl", *twice))
    parts = {split: load_split(path, split) for split in SPLITS}
    tests = {x.history for x in parts["test"].examples}
    shared = sum(x.history in tests for x in parts["train"].examples)
    told = f"{shared} of {len(parts['train'].examples)} training rows are test rows too"
    assert shared and parts["train"].notes[1].startswith(told)
    assert len(parts["valid"].notes) == len(parts["test"].notes) == 1


def test_marked_titles_alone_count_where_there_are_any(tmp_path: Path) -> None:
    chats = [chat(n, "Sanditon", mark=True) for n in range(3)]
    chats[0]["messages"].append({"role": "assistant", "content": 'Or "Emma".'})
    path = str(write_lines(tmp_path / "books.jsonl", *chats))
    assert [x.title for x in load_catalogue(path)] == ["Sanditon"]
    assert sum(len(load_split(path, split).examples) for split in SPLITS) == 3


def test_a_name_of_several_items_stays_open_and_the_first_spelling_of_a_title_is_kept() -> None:
    said = chat(1, "Night Ferry")["messages"]
    known = Catalogue(read_item({"name": f"Night Ferry ({year})"}) for year in (1950, 1990))
    rows, *_ = datasets.rows_of_chats({"train": [(str(n), said) for n in range(3)]}, known)
    assert [row["rec"] for own in rows.values() for row in own] == [["Night Ferry"]] * 3
    both = datasets.catalogue_of(["Red Loft (2001)", "RED LOFT (2001)"])
    assert [x.title for x in both] == ["Red Loft (2001)"]


@pytest.mark.parametrize(
    ("chats", "fault"),
    [
        ([chat(1, "Heat (1995)"), chat(2, "Heat (1995)")], "chats.jsonl, .* 2 turns .* 3 dial"),
        ([chat(n) for n in range(9)], "chats.jsonl, line 9: 9 dialogues have 0 turns"),
        ([], "nothing was read: 0 dialogues have 0 turns"),
        ([{"messages": [{"role": "critic", "content": "x"}]}], "line 1: a message needs a role"),
        ([[{"role": "user", "content": "x", "items": "Up"}]], "line 1: 'items' must be a list"),
        ([[{"role": "user", "content": "x", "items": [" "]}]], "line 1: the item has no name"),
    ],
)
def test_a_file_of_chats_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, chats: list[Any], fault: str
) -> None:
    path = str(write_lines(tmp_path / "chats.jsonl", *chats))
    with pytest.raises(UserError, match=fault):
        load_split(path, "train")


def test_ten_chats_go_through_train_and_infer_with_one_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, place = write_small_model(tmp_path / "model"), tmp_path / "run"
    titles = ("Heat (1995)", "Alien (1979)", "Up (2009)")
    path = write_lines(tmp_path / "ten.jsonl", *(chat(n, titles[n % 3]) for n in range(10)))
    options = {"--data": path, "--model": model, "--run-dir": place, "--dtype": "float32"}
    assert train.main(flags({**options, **STAGE_FLAGS})) == 0
    assert json.loads((place / "report.json").read_text())
    capsys.readouterr()
    assert infer.main(["--run-dir", str(place), "--limit", "0", "--rank", "3", "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["ranked"]
    assert {x["title"] for x in ranked} == set(titles)


# --- catalogues -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"author": "J. Austen", "genre": ["satire"], "year": 1815}, "satire, 1810s, by J. Austen"),
        ({"artist": ["Sun Ra"], "category": ["Science Fiction", "Sci-Fi"]}, "sci-fi, by Sun Ra"),
        ({"brand": "Bialetti", "category": "coffee maker"}, "coffee maker, by Bialetti"),
        ({"director": [], "author": ["A"], "star": [], "actor": ["B"]}, "by A, with B"),
        ({"director": ["A"], "author": ["B"], "star": ["C"], "actor": ["D"]}, "by A, with C"),
    ],
)  # fmt: skip
def test_books_music_and_products_have_makers_and_categories(
    entry: dict[str, Any], told: str
) -> None:
    assert card(read_item({"name": "Emma", **entry})) == told


# --- check ------------------------------------------------------------------------------------


def test_check_counts_what_is_odd_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("Heat (1995)", "True Grit (1969)", "True Grit (2010)", "Drama (2001)")
    items = {str(n): {"name": name} for n, name in enumerate(names)}
    (tmp_path / "items.json").write_text(json.dumps(items))
    row = {"dialog_id": 1, "turn_id": 1, "context": ["Hi"], "rec": ["Heat (1995)"], "resp": "Heat!"}
    told = {**row, "dialog_id": "b", "context": ["", "Hello", "I saw Heat (1995)."]}
    rows = [
        {**row, "dialog_id": "a", "rec": ["True Grit", "Nobody (1900)", "Drama"]},
        told,
        {**told, "context": ["Hello", "Heat is on."], "rec": ["Heat (1995)"]},
    ]
    write_lines(tmp_path / "train.jsonl", *rows)
    # a name of two films does not name the one that is the label
    other = {**row, "dialog_id": "v", "context": ["I saw True Grit."], "rec": ["True Grit (1969)"]}
    write_lines(tmp_path / "valid.jsonl", other)
    write_lines(tmp_path / "test.jsonl", {**row, "dialog_id": "a"})
    code, out, _ = run(capsys, "check", tmp_path)
    assert code == 0 and out.splitlines() == [
        "train: 3 rows of 2 dialogues",
        "1 of 5 gold titles of train are not in the items, such as 'Nobody (1900)': Recall@1 "
        "and the grade know none of them",
        "1 of 3 training rows are test rows too: results on them say nothing of new dialogues",
        "train, labels that may mean several items: 1, such as 'True Grit' in dialogue a",
        "train, labels that the catalogue lacks: 1, such as 'Nobody (1900)' in dialogue a",
        "train, labels that are the name of a genre: 1, such as 'Drama' in dialogue a",
        "train, labels that the context names already: 1, such as 'Heat (1995)' in dialogue b",
        "train, labels where the recommender opens: 2, such as 'Heat (1995)' in dialogue b",
        "valid: 1 rows of 1 dialogues",
        "test: 1 rows of 1 dialogues",
        "dialogues of both train and test: 1, such as a",
    ]


def test_check_ends_with_2_where_the_data_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "check", "sample")[0] == 0
    assert run(capsys, "check", "redail")[0] == 2
    row = {"dialog_id": 1, "turn_id": 1, "context": ["Hi"], "rec": ["Heat (1995)"], "resp": "Heat!"}
    write_lines(tmp_path / "train.jsonl", row, {**row, "rec": []})
    (tmp_path / "items.json").write_text('{"1": {"name": "Heat (1995)"}}')
    code, _, err = run(capsys, "check", tmp_path)
    assert code == 2 and "train.jsonl, line 2: 'rec' must name at least one item" in err


def test_the_commands_run_as_a_module_and_name_their_formats(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [form] = [x for x in KNOWN["commands"]["convert"][1].values() if "choices" in x]
    assert form["choices"] == list(conversion.READERS)
    assert KNOWN["commands"]["fetch"][1]["name"]["choices"] == list(KNOWN["sources"])
    text = Path(datasets.__file__).read_text("utf-8")
    assert text.endswith("from usbrec.crs.conversion import main\n\n    raise SystemExit(main())\n")
    assert run(capsys, "fetch", "netflix")[0] == run(capsys)[0] == 2
