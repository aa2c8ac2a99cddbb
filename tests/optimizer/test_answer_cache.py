from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optc.optimizer import answer_cache
from optc.optimizer.answer_cache import AnswerCache, key_of

KEY = key_of("probe", "a", 1)
ANSWER = {"by": "parser", "text": "no, nö and \x02n1\x03", "nodes": [1, 2]}


def test_what_is_written_is_read_by_the_next(tmp_path: Path) -> None:
    AnswerCache(tmp_path).write(KEY, ANSWER)
    assert AnswerCache(tmp_path).read(KEY) == ANSWER
    assert AnswerCache(tmp_path).read(key_of("probe", "a", 2)) is None


def test_keys_tell_their_parts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of("a", "b"), key_of("b", "b"), key_of("a", "b", None), key_of("a", ("b",))]
    monkeypatch.setattr(answer_cache, "FORMAT", answer_cache.FORMAT + 1)
    keys.append(key_of("a", "b"))
    assert len(set(keys)) == len(keys)


def test_a_damaged_answer_is_as_good_as_none(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.write(KEY, ANSWER)
    [file] = tmp_path.rglob("*.json")
    whole = file.read_bytes()
    for length in range(len(whole)):  # half written
        file.write_bytes(whole[:length])
        assert cache.read(KEY) is None
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.read(KEY) is None
    file.write_bytes(b"\xff\xfe")
    assert cache.read(KEY) is None
    cache.write(KEY, ANSWER)
    assert cache.read(KEY) == ANSWER


def test_the_answer_to_another_question_is_no_answer(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.write(KEY, ANSWER)
    [file] = tmp_path.rglob("*.json")
    other = key_of("probe", "a", 2)
    (tmp_path / other[:2]).mkdir(exist_ok=True)
    file.rename(tmp_path / other[:2] / f"{other}.json")
    assert cache.read(other) is None


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    cache = AnswerCache(blocked / "cache")
    cache.write(KEY, ANSWER)
    assert cache.read(KEY) is None


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    # The limit is of a process, so it is another one that runs into it.
    program = f"""if True:
        import resource, signal
        from pathlib import Path
        from optc.optimizer.answer_cache import AnswerCache
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        AnswerCache(Path({str(tmp_path)!r})).write({KEY!r}, "a" * 100)
    """
    subprocess.run([sys.executable, "-c", program], check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_many_processes_may_write_the_same_answer_at_once(tmp_path: Path) -> None:
    program = f"""if True:
        from pathlib import Path
        from optc.optimizer.answer_cache import AnswerCache
        cache = AnswerCache(Path({str(tmp_path)!r}))
        for i in range(200):
            cache.write({KEY!r}, {ANSWER!r})
            assert cache.read({KEY!r}) == {ANSWER!r}
    """
    writers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]
