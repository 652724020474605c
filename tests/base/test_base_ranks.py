"""Ranks: sums, exchanges, failures that reach the caller, and workers that do not outlive it."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pensar.base.errors import ConfigError, DataError, RunError
from pensar.base.ranks import Crew, World

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(ranks=2, threads=1) as crew:
        yield crew


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def test_two_ranks_exchange_values(crew: Crew) -> None:
    import rank_work

    result = crew.call(rank_work.exchange, [1.0, 2.0])
    assert result["sum"] == [3.0, 6.0]
    assert result["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 10}]
    assert result["broadcast"] == "from 0"
    assert result["threads"] == [1, 1]
    assert result["pids"][0] == os.getpid() != result["pids"][1]
    again = crew.call(rank_work.exchange, [5.0])
    assert again["sum"] == [15.0]
    assert again["pids"] == result["pids"], "workers must live on between calls"


def test_large_objects_are_broadcast_whole(crew: Crew) -> None:
    import rank_work

    assert crew.call(rank_work.broadcast_back, 100_000)


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_what_was_dealt_out_comes_back_in_its_order(crew: Crew, num: int) -> None:
    import rank_work

    assert crew.call(rank_work.deal, num) == list(range(num))
    assert World().dealt(list(range(num))) == list(range(num))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_any_rank_reaches_the_caller_and_the_crew_recovers(crew: Crew, rank: int) -> None:
    import rank_work

    with pytest.raises(DataError, match=f"row 7 on rank {rank} has 3 columns"):
        crew.call(rank_work.fail_on, rank)
    assert crew.call(rank_work.exchange, [1.0])["sum"] == [3.0]


def test_an_exception_that_does_not_pickle_still_tells_its_text(crew: Crew) -> None:
    import rank_work

    with pytest.raises(RunError, match="cannot travel"):
        crew.call(rank_work.fail_strangely)


def test_a_killed_rank_is_named(crew: Crew) -> None:
    import rank_work

    with pytest.raises(RunError, match=r"rank 1 .* ended by signal 9"):
        crew.call(rank_work.be_killed)


def test_usage_counts_every_rank(crew: Crew) -> None:
    import rank_work

    crew.call(rank_work.exchange, [1.0])
    crew.reset_peaks()
    usage = crew.usage()
    assert len(usage) == 2
    assert os.getpid() in usage
    assert all(use.cpu_seconds > 0 and use.peak_memory_bytes > 2**20 for use in usage.values())


def test_workers_die_when_the_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from pensar.base.ranks import Crew\n"
        "import rank_work\n"
        "if __name__ == '__main__':\n"
        f"    Crew(ranks=2).call(rank_work.tell_pids_and_hang, {str(tmp_path)!r})\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    _wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    worker = int(files[1].read_text())
    assert _alive(worker)
    parent.kill()
    parent.wait()
    _wait_until(lambda: not _alive(worker))


def test_one_rank_is_a_plain_call_without_torch() -> None:
    code = (
        "import sys; from pensar.base.ranks import Crew\n"
        "assert Crew().call(lambda world, x: world.gather(x) + [world.broadcast(x), world.size], 5) == [5, 5, 1]\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_crew_crosses_processes_as_a_crew_of_one() -> None:
    assert pickle.loads(pickle.dumps(Crew(ranks=3))).ranks == 1
    assert World().size == 1


def test_a_crew_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 ranks of 1 threads: both must be at least 1"):
        Crew(ranks=0)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait_until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
