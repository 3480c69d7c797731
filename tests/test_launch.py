"""Starting ranks, ending those that hang, and what each rank gets of the machine."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_gpu_memory import FULL

from common.errors import InputError
from distributed import launch as launching
from distributed import ranks as ranking
from distributed.launch import launch
from distributed.ranks import joined, local_device
from training.batches import MOST_WORKERS, default_workers
from utils import choose_device

# Rank 0 hangs as behind a dead peer: its main thread is in native code, so that no signal handler
# of Python runs. Rank 1 ends by itself once rank 0 hangs.
STUCK = """
import ctypes, os, signal, sys, time
here = sys.argv[1]
if os.environ["RANK"] == "0":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(75))
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    open(here, "w").write(str(os.getpid()))
    ctypes.PyDLL(None).sleep(600)
while not os.path.exists(here):
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("last_words", "code", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "rank 1 of 2 was killed by signal 9"),
        ("os.kill(os.getpid(), signal.SIGABRT)", 1, "rank 1 of 2 was killed by signal 6"),
        ("sys.exit(1)", 1, None),  # It has printed a traceback.
        ("sys.exit(2)", 2, None),  # It has printed an error line.
    ],
)
def test_a_rank_that_hears_no_signal_is_killed_and_not_blamed(
    last_words: str,
    code: int,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv(launching.GRACE, "0.5")
    (tmp_path / "stuck.py").write_text(STUCK + last_words)
    before = time.monotonic()
    assert launch(str(tmp_path / "stuck.py"), [str(tmp_path / "pid")], 2) == code
    assert 0.5 < time.monotonic() - before < 20
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    said = capfd.readouterr().err
    assert said.count("error:") == (told is not None) and (told or "") in said


class Rank:
    """A rank that ends when a signal in `heeds` comes, with a code for each."""

    def __init__(self, code: int | None = None, **heeds: int) -> None:
        self.returncode, self.heeds, self.heard = code, heeds, []

    def poll(self) -> int | None:
        return self.returncode

    def hear(self, name: str) -> None:
        self.heard.append((name, launching.time.monotonic()))
        if self.returncode is None:
            self.returncode = self.heeds.get(name)

    def terminate(self) -> None:
        self.hear("terminate")

    def kill(self) -> None:
        self.hear("kill")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time in which waiting takes no time."""
    now = [1000.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    monkeypatch.setattr(launching, "time", clock)
    monkeypatch.delenv(launching.GRACE, raising=False)
    return clock


@pytest.mark.parametrize(
    ("asked", "variable", "seconds"),
    [([], None, 30), ([signal.SIGTERM], None, 120), ([], "7", 7), ([signal.SIGTERM], "200", 200)],
)
def test_the_seconds_before_a_rank_is_killed(
    asked: list[int],
    variable: str | None,
    seconds: float,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
):
    if variable:
        monkeypatch.setenv(launching.GRACE, variable)
    stuck, dead = Rank(kill=-9), Rank(-9)
    assert launching._wait([stuck, dead], asked) == [1]
    names = [name for name, _ in stuck.heard]
    assert names == (["kill"] if asked else ["terminate", "kill"])
    assert stuck.heard[-1][1] == pytest.approx(1000 + seconds, abs=0.3)


def test_a_rank_that_cannot_even_be_killed_is_given_up(
    clock: SimpleNamespace, capfd: pytest.CaptureFixture[str]
):
    held = Rank()
    failed = launching._wait([held, Rank(-9)], [])
    assert clock.monotonic() == pytest.approx(1000 + 30 + 30, abs=0.5)
    assert launching._exit_code([None, -9], [], failed) == 1
    said = capfd.readouterr().err
    assert "rank 0 does not end" in said and "rank 1 of 2 was killed by signal 9" in said
    assert launching._exit_code([None, 0], [signal.SIGTERM], []) == 128 + signal.SIGTERM


class Gpus:
    """The calls to `torch.cuda` on a machine with four GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "set_device", self.current.append)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


@pytest.fixture
def rank_2(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"LOCAL_RANK": 2, "RANK": 6, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")


@pytest.mark.parametrize("name", ["cuda:1", "cuda:3"])
def test_the_gpu_that_a_flag_names_becomes_the_current_one(name: str, gpus: Gpus):
    assert local_device(choose_device(name)) == torch.device(name)
    assert gpus.current == [torch.device(name)]


def test_the_first_gpu_and_a_cpu_need_no_choice(gpus: Gpus):
    for name in ("cuda", "cpu"):
        assert local_device(torch.device(name)) == torch.device(name)
    assert gpus.current == []


@pytest.mark.usefixtures("rank_2")
def test_a_rank_never_touches_another_gpu(gpus: Gpus):
    assert local_device(torch.device("cuda")) == torch.device("cuda:2")
    assert gpus.current == [torch.device("cuda:2")]


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA-capable device(s) is/are busy or unavailable"]
)
def test_a_gpu_that_cuda_refuses_is_a_sentence(
    words: str, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
):
    def refuse(device: torch.device) -> None:
        raise torch.AcceleratorError(f"{words}\nCUDA kernel errors might be asynchronous")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(InputError, match=r"^cuda:1 cannot be used .*another --device$") as caught:
        local_device(torch.device("cuda:1"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("rank_2")
@pytest.mark.parametrize("theirs", [None, "77"])
def test_nccl_connects_to_its_gpu_at_once_under_a_watchdog(
    theirs: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in ranking.NCCL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if theirs:
        monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", theirs)
    store = torch.distributed.HashStore()
    given: dict[str, Any] = {}

    def init(backend: str, **kwargs: Any) -> None:
        variables = {name: os.environ[name] for name in ranking.NCCL_VARIABLES}
        given.update(kwargs, backend=backend, variables=variables)

    monkeypatch.setattr(ranking, "_meet", lambda: (store, 6, 8))
    monkeypatch.setattr(ranking.dist, "init_process_group", init)
    monkeypatch.setattr(ranking.dist, "new_group", lambda **kwargs: kwargs)
    monkeypatch.setattr(ranking.dist, "destroy_process_group", lambda: None)
    with joined(torch.device("cuda:2")) as ranks:
        assert ranks.control == {"backend": "gloo", "timeout": timedelta(hours=12)}
    assert (given["backend"], given["device_id"]) == ("nccl", torch.device("cuda:2"))
    assert given["timeout"] == timedelta(minutes=30)
    told = given["variables"]
    assert told["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == (theirs or "480")
    assert told["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert told["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    # A watchdog that hangs ends its process before the other ranks give up.
    assert 3 * int(ranking.NCCL_VARIABLES["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) < 30 * 60
    for name in ranking.NCCL_VARIABLES:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("rank_2")
def test_nccl_without_memory_is_no_lost_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranking, "_meet", lambda: (torch.distributed.HashStore(), 6, 8))
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(ranking.dist, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the process would end at once"))
    with pytest.raises(RuntimeError) as caught, joined(torch.device("cpu")):
        raise FULL[-1]
    assert caught.value is FULL[-1]


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (16, 1, 8), (128, 8, 8), (16, 2, 7), (16, 4, 3), (4, 8, 1)],
)
def test_loader_processes_share_the_cores(
    cores: int, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_workers(torch.device("cuda")) == workers <= MOST_WORKERS
    assert ranks * workers <= max(cores, ranks)
    assert default_workers(torch.device("cpu")) == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # A script that runs alone.
    assert default_workers(torch.device("cuda")) == min(MOST_WORKERS, max(1, cores - 1))


def test_the_launcher_tells_ranks_how_many_they_are(tmp_path: Path):
    words = "import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write("
    (tmp_path / "say.py").write_text(
        f"{words}os.environ['LOCAL_WORLD_SIZE'] + ' ' + os.environ['OMP_NUM_THREADS'])"
    )
    assert launch(str(tmp_path / "say.py"), [str(tmp_path / "rank")], 3) == 0
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // 3)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(3)]
    assert said == [f"3 {threads}"] * 3
