"""What was reported as safe is there once and whole, whatever happens to the process or the disk."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from pensar.base.errors import ConfigError, DataError, RunError
from pensar.infer import outbox
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.outbox import Consumer, Outbox, UsageRecord, prune, usage_of

WRITER = """
import sys
from pathlib import Path
import msgspec
from pensar.infer.outbox import Outbox, UsageRecord

life, given = sys.argv[2], msgspec.json.decode(sys.argv[3])
with Outbox(Path(sys.argv[1]), commit_seconds=0.001, file_bytes=3_000) as box:
    for number in range(1_000_000):
        given |= {"id": f"{life}-{number}", "user": "u" * (number * 7 % 300)}
        last = box.append(UsageRecord(**given))
        if number % 13 == 0:
            print(number, last, box.durable, flush=True)
"""


def record(name: str, **fields: object) -> UsageRecord:
    given = {
        "id": name,
        "user": "ann",
        "model": "tiny",
        "adapter": "",
        "prompt_tokens": 5,
        "cached_tokens": 1,
        "reasoning_tokens": 2,
        "output_tokens": 7,
        "finish_reason": "stop",
        "finished": 1.5,
        "version": 0,
    }
    return UsageRecord(**(given | fields))


def everything(folder: Path) -> list[tuple[int, UsageRecord]]:
    return Consumer(folder, "all").read(0, limit=10**9)


def test_records_come_back_in_order_with_their_numbers(tmp_path):
    records = [record(f"r{number}", user=f"ü\n\r\u2028{number}") for number in range(1000)]
    with Outbox(tmp_path, file_bytes=5_000) as box:
        numbers = [box.append(one) for one in records]
        assert box.wait(numbers[-1], 30)
        assert box.durable == 1000
        assert everything(tmp_path) == list(zip(range(1, 1001), records, strict=True))
    assert numbers == list(range(1, 1001))
    with Outbox(tmp_path, file_bytes=5_000) as box:  # and go on after them
        assert box.durable == 1000
        assert box.append(record("later")) == 1001
        assert box.wait(1001, 30)
    assert everything(tmp_path)[-1] == (1001, record("later"))


def test_files_are_rotated_by_size_and_named_for_their_first_number(tmp_path):
    with Outbox(tmp_path, commit_seconds=0, file_bytes=1_000) as box:
        for number in range(60):
            assert box.wait(box.append(record(f"r{number}")), 30)
    files = sorted(tmp_path.glob("usage-*.jsonl"))
    assert len(files) > 5
    firsts = [int(path.stem.removeprefix("usage-")) for path in files]
    lengths = [len(path.read_bytes().splitlines()) for path in files]
    assert firsts == [1 + sum(lengths[:index]) for index in range(len(files))]
    assert all(path.stat().st_size < 1_300 for path in files)
    assert [number for number, _ in everything(tmp_path)] == list(range(1, 61))


def test_a_commit_takes_all_that_has_come_so_that_appending_waits_for_no_disk(tmp_path, monkeypatch):
    syncs, real = [], os.fsync

    def slow(descriptor):
        syncs.append(threading.current_thread().name)
        time.sleep(0.05)
        real(descriptor)

    with Outbox(tmp_path, commit_seconds=0) as box:
        monkeypatch.setattr(os, "fsync", slow)
        start = time.perf_counter()
        for number in range(2_000):
            box.append(record(f"r{number}"))
        appending = time.perf_counter() - start
        assert box.wait(2_000, 30)
    assert set(syncs) == {"outbox"}
    assert len(syncs) <= 2 + appending / 0.05
    assert appending < 2.0  # each of them waiting for its own sync would be 100 seconds


def test_what_is_not_yet_synced_is_seen_by_nobody(tmp_path, monkeypatch):
    reached, go_on, real = threading.Event(), threading.Event(), os.fsync

    def held(descriptor):
        reached.set()
        assert go_on.wait(30)
        real(descriptor)

    with Outbox(tmp_path, commit_seconds=0) as box:
        assert box.wait(box.append(record("first")), 30)
        monkeypatch.setattr(os, "fsync", held)
        number = box.append(record("second"))
        assert reached.wait(30)
        assert box.durable == 1
        assert not box.wait(number, 0.02)
        assert [one.id for _, one in everything(tmp_path)] == ["first"]
        go_on.set()
        assert box.wait(number, 30)
        assert [one.id for _, one in everything(tmp_path)] == ["first", "second"]


@pytest.mark.parametrize("where", range(0, 400, 23))
def test_a_torn_end_is_cut_off_and_its_numbers_are_given_anew(tmp_path, where):
    """A power cut leaves any part of what was not synced; here `where` bytes behind the last safe record."""
    with Outbox(tmp_path) as box:
        for number in range(3):
            box.append(record(f"safe-{number}"))
        box.wait(3, 30)
    (path,) = tmp_path.glob("usage-*.jsonl")
    safe = path.read_bytes()
    note = (tmp_path / "durable").read_bytes()
    with Outbox(tmp_path) as box:
        box.wait(box.append(record("lost-1")) and box.append(record("lost-2")), 30)
    lines = path.read_bytes()[len(safe) :].splitlines(keepends=True)
    path.write_bytes((safe + b"".join(lines))[: len(safe) + where])
    (tmp_path / "durable").write_bytes(note)
    kept = sum(where >= len(b"".join(lines[: count + 1])) for count in range(2))
    with Outbox(tmp_path) as box:
        assert box.durable == 3 + kept
        box.wait(box.append(record("new")), 30)
    names = [one.id for _, one in everything(tmp_path)]
    assert names == ["safe-0", "safe-1", "safe-2", *["lost-1", "lost-2"][:kept], "new"]


def test_damage_to_what_was_safe_is_an_error_and_not_cut_off(tmp_path):
    with Outbox(tmp_path) as box:
        for number in range(3):
            box.append(record(f"r{number}"))
    (path,) = tmp_path.glob("usage-*.jsonl")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"r1", b"rX"))
    with pytest.raises(DataError, match=r"is damaged at byte \d+ and record 3 was safe"):
        Outbox(tmp_path)
    with pytest.raises(DataError, match=r"is damaged at byte \d+; restore"):
        everything(tmp_path)
    path.write_bytes(content)
    assert len(everything(tmp_path)) == 3
    Outbox(tmp_path).close()  # the lock was freed by the failed attempt


def test_one_writer_has_the_folder(tmp_path):
    with Outbox(tmp_path), pytest.raises(RunError, match="is in use by process"):
        Outbox(tmp_path)


def test_a_full_disk_keeps_records_in_memory_until_it_takes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.01)
    real, broken = os.fsync, [True]

    def full(descriptor):
        if broken[0] and threading.current_thread().name == "outbox":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    box = Outbox(tmp_path, commit_seconds=0, max_pending=3)
    first = box.append(record("a"))
    assert not box.wait(first, 0.1)
    assert "disk full" in box.failure
    box.append(record("b"))
    box.append(record("c"))
    with pytest.raises(RunError, match="3 usage records wait for the disk, the limit is 3: disk full"):
        box.append(record("d"))
    broken[0] = False
    assert box.wait(3, 30)
    assert box.failure is None
    assert [one.id for _, one in everything(tmp_path)] == ["a", "b", "c"]
    broken[0] = True
    box.append(record("e"))
    with pytest.raises(RunError, match="1 usage records could not be written: disk full"):
        box.close()
    broken[0] = False
    with pytest.raises(RunError, match="this outbox is closed"):
        box.append(record("f"))
    # What it had written without a sync may be there or not, but never twice and never torn.
    with Outbox(tmp_path) as again:
        names = [one.id for _, one in everything(tmp_path)]
        assert names[:3] == ["a", "b", "c"]
        assert names[3:] in ([], ["e"])
        assert again.durable == len(names)


def test_a_consumer_goes_on_where_it_has_acknowledged(tmp_path):
    with Outbox(tmp_path, commit_seconds=0, file_bytes=700) as box:
        for number in range(1, 31):
            box.wait(box.append(record(f"r{number}")), 30)
        bill = Consumer(tmp_path, "bill")
        assert bill.acknowledged == 0
        first = bill.read(limit=10)
        assert [number for number, _ in first] == list(range(1, 11))
        assert bill.read(limit=10) == first  # read again until acknowledged
        assert [number for number, _ in bill.read(10, limit=7)] == list(range(11, 18))
        bill.acknowledge(12)
        later = Consumer(tmp_path, "bill")
        assert later.acknowledged == 12
        assert [number for number, _ in later.read(limit=3)] == [13, 14, 15]
        assert Consumer(tmp_path, "audit").read(limit=1)[0][0] == 1
        assert later.read(30) == []
        for wrong in (11, 31):
            with pytest.raises(
                ConfigError, match=f"record {wrong} cannot be acknowledged; it must be from 12 to 30"
            ):
                later.acknowledge(wrong)
    with pytest.raises(ConfigError, match="consumer's name"):
        Consumer(tmp_path, "../x")


def test_only_what_every_consumer_is_done_with_is_deleted(tmp_path):
    with Outbox(tmp_path, commit_seconds=0, file_bytes=700) as box:
        for number in range(1, 31):
            box.wait(box.append(record(f"r{number}")), 30)
        assert prune(tmp_path) == 0
        bill, audit = Consumer(tmp_path, "bill"), Consumer(tmp_path, "audit")
        bill.acknowledge(30)
        audit.acknowledge(20)
        held = audit.read(limit=5)
        assert prune(tmp_path) > 3
        assert audit.read(limit=5) == held
        assert [number for number, _ in audit.read()] == list(range(21, 31))
        with pytest.raises(DataError, match="has no record 0"):
            audit.read(0)
        audit.acknowledge(30)
        prune(tmp_path)
        assert len(list(tmp_path.glob("usage-*.jsonl"))) == 1
        box.wait(box.append(record("r31")), 30)
        assert [one.id for _, one in bill.read()] == ["r31"]
    with Outbox(tmp_path) as box:
        assert box.durable == 31


def test_the_record_is_what_the_engine_has_counted(tmp_path, model):
    engine = Engine(model)
    request = Request("r", list(range(40)), SamplingParams(max_tokens=5), user="ann")
    engine.run([request])
    (done,) = engine.run([request])
    found = usage_of(request, done, "tiny", finished=2.0)
    assert found == record(
        "r",
        prompt_tokens=40,
        cached_tokens=32,  # whole pages of what came before
        reasoning_tokens=0,
        output_tokens=5,
        finish_reason="length",
        finished=2.0,
    )
    assert abs(usage_of(request, done, "tiny").finished - time.time()) < 5


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_lost_torn_or_doubled_when_the_writer_is_killed_at_any_moment(tmp_path, seed):
    """Lives of one folder, each ended by SIGKILL after a random time, with a consumer that reads along."""
    draw = random.Random(seed)
    lives, reported = 4 if seed == 0 else 25, {}
    reader = Consumer(tmp_path, "bill")
    seen: list[UsageRecord] = []
    for life in range(lives):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(life)]
        command.append(msgspec.json.encode(record("")).decode())
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline()]  # it writes
            end = time.monotonic() + draw.uniform(0.0, 0.4)
            while time.monotonic() < end:
                seen += taken(reader)
            writer.send_signal(signal.SIGKILL)
            lines += [line for line in writer.stdout if line.endswith("\n")]
        reported[life] = [tuple(map(int, line.split())) for line in lines]
    Outbox(tmp_path, file_bytes=3_000).close()
    while found := taken(reader):
        seen += found
    stored = [one for _, one in everything(tmp_path)]
    assert seen == stored
    start = 0
    for life in range(lives):
        mine = [one.id for one in stored if one.id.startswith(f"{life}-")]
        assert mine == [f"{life}-{number}" for number in range(len(mine))]  # no gap, none twice, in order
        assert stored[start : start + len(mine)] == [one for one in stored if one.id.startswith(f"{life}-")]
        number, last, durable = reported[life][-1]
        assert last == start + number + 1  # numbers go on where the last life was cut off
        assert start + len(mine) >= durable
        start += len(mine)
    assert start == len(stored) > 100
    assert len(list(tmp_path.glob("usage-*.jsonl"))) > 3


def taken(reader: Consumer) -> list[UsageRecord]:
    found = reader.read(limit=2_000)
    if found:
        reader.acknowledge(found[-1][0])
    return [one for _, one in found]
