"""The proof on a GPU: whatever a stage does, the others run and the JSON holds what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import table
from benchmarks.gpu import __main__ as proof
from benchmarks.gpu import attention, child, repeats, report, running, syncs
from benchmarks.gpu.rows import Row, Setting, at_least, at_most, from_json, holds, not_run, to_json
from common.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = Setting(torch.device("cpu"), small=True)
# A child as the runner starts it, without the seconds of importing PyTorch.
FAKE_CHILD = """
import json, os, signal, subprocess, sys, time
kind = sys.argv[sys.argv.index("--child") + 1]
descriptor = int(sys.argv[sys.argv.index("--rows_fd") + 1])

def send(content):
    os.write(descriptor, json.dumps(content).encode() + b"\\n")

send({"where": {"device": "fake", "date": "d", "python": "3", "torch": "2", "versions": {},
      "commit": None}})
print('{"row": "stray"}')
print("stray\\n" * 100_000, file=sys.stderr)
send({"row": {"what": kind, "value": 1.0}})
if kind == "crash":
    raise ValueError("what broke")
if kind == "hang":
    time.sleep(60)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "orphan":
    orphan = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    send({"row": {"what": "orphan", "value": float(orphan.pid)}})
send({"row": {"what": "second", "value": "text", "passed": True}})
if kind != "silent end":
    send({"finished": True})
"""


@pytest.fixture
def fake_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fake_child.py"
    path.write_text(FAKE_CHILD)
    monkeypatch.setattr(running, "CHILD", (str(path),))


def run(output: Path, *kinds: str, more: tuple[str, ...] = ()) -> tuple[int, dict]:
    """Run fake stages; return the exit code and the content of the JSON."""
    stages = {kind: (kind, 0.5) for kind in kinds}
    code = proof.main(["--small", "--device", "cpu", "--output", str(output), *more], stages)
    return code, json.loads(output.read_text())


@pytest.mark.usefixtures("fake_child")
def test_a_stage_that_breaks_ends_alone_and_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    counts = []

    def written(path: Path, content: dict) -> None:
        write(path, content)
        stages = json.loads(path.read_text())["stages"].values()
        counts.append(sum(len(stage["rows"]) for stage in stages))

    write = proof.write_json
    monkeypatch.setattr(proof, "write_json", written)
    code, found = run(tmp_path / "o.json", "crash", "hang", "killed", "silent end", "good")
    assert code == proof.EXIT_FAILED and found["where"]["device"] == "fake"
    rows = {name: [from_json(row) for row in s["rows"]] for name, s in found["stages"].items()}
    assert [row.what for row in rows["good"]] == ["good", "second"]
    assert all(stage[0] == Row(name, 1.0) for name, stage in rows.items())
    ends = {name: stage[-1] for name, stage in rows.items() if name != "good"}
    assert all(row.passed is False and row.what == running.TO_THE_END for row in ends.values())
    assert ends["crash"].value == "ended with code 1"
    assert ends["crash"].note == "ValueError: what broke"
    assert ends["hang"].value == "killed after 2 s, the stage's deadline"
    assert ends["killed"].value == "killed by SIGKILL"
    assert ends["silent end"].value == "ended with code 0"  # it said nothing of its end
    assert found["stages"]["crash"]["stderr"].endswith("ValueError: what broke")
    assert len(found["stages"]["crash"]["stderr"]) <= running.KEPT_OF_STDERR
    assert counts == sorted(counts) and set(range(1, 12)) <= set(counts)  # one row at a time
    told = capsys.readouterr().out
    assert "| crash | the stage runs to its end | ended with code 1 |" in told
    assert "2 PASS, 4 FAIL, 5 figure, 0 not run. fake, d, Python 3, torch 2" in told


@pytest.mark.usefixtures("fake_child")
def test_what_a_stage_leaves_behind_is_ended(tmp_path: Path):
    started = time.monotonic()
    code, found = run(tmp_path / "o.json", "orphan")
    assert code == 0 and time.monotonic() - started < 2  # not the 60 s of the process it left
    pid = int(found["stages"]["orphan"]["rows"][1]["value"])
    end = time.monotonic() + 5  # a signal reaches a process only when it gets a core
    while (state := state_of(pid)) not in (None, "Z") and time.monotonic() < end:
        time.sleep(0.01)
    assert state in (None, "Z")


def state_of(pid: int) -> str | None:
    """Return the letter of a process's state; None: there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.mark.usefixtures("fake_child")
def test_the_total_deadline_ends_a_stage_and_leaves_out_the_rest(tmp_path: Path):
    more = ("--deadline", "0.01")
    code, found = run(tmp_path / "o.json", "hang", "good", more=more)
    assert code == proof.EXIT_FAILED
    late, left_out = (stage["rows"][-1] for stage in found["stages"].values())
    assert late["value"] == "killed after 1 s, the total deadline of 0.01 minutes"
    assert from_json(left_out) == not_run(
        "the stage", "it would start after the total deadline of 0.01 minutes"
    )
    assert run(tmp_path / "o.json", "good", "hang", more=("--only", "good"))[0] == 0


FAKE_STAGES = """
import os
from benchmarks.gpu.rows import Row, at_most

def stage(setting):
    assert setting.small
    print("a stray print")
    yield at_most("error", float("nan"), 1)
    yield Row("figure", float("inf"))
    yield Row("value", 0.5, "ms")
    yield Row("cuBLAS", os.environ["CUBLAS_WORKSPACE_CONFIG"])
    raise RuntimeError("broken")
"""


def test_the_child_sends_each_row_and_no_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "fake_stages.py").write_text(FAKE_STAGES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")  # with which strict mode refuses
    path = tmp_path / "rows"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(RuntimeError, match="broken"):
        child.run_child("fake_stages:stage", descriptor, "cpu", small=True)
    os.close(descriptor)
    assert "a stray print" in capfd.readouterr().out

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    first, *rest = (
        json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()
    )
    assert first["where"]["torch"] == torch.__version__ and "commit" in first["where"]
    error, figure, value, cublas = (from_json(content["row"]) for content in rest)
    assert (error.value, error.passed, error.verdict) == ("nan", False, "FAIL")
    assert (figure.value, figure.passed) == ("inf", False)
    assert value == Row("value", 0.5, "ms") and value.verdict == "figure"
    assert cublas.value == ":4096:8"


STUCK_STAGE = """
import multiprocessing, tempfile, time
from benchmarks.gpu.rows import Row

def stage(setting):
    yield Row("folder", tempfile.mkdtemp())
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    raise ValueError("broken while a process runs")
"""


def test_a_broken_stage_waits_for_no_process_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "stuck_stage.py").write_text(STUCK_STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--device", "cpu", "--small"]
    contents = list(running.run_stage("stuck_stage:stage", flags, 300, "the deadline"))
    folder, end = (from_json(content["row"]) for content in contents if "row" in content)
    assert not Path(folder.value).exists()
    assert (end.what, end.value) == (running.TO_THE_END, "ended with code 1")
    assert end.note == "ValueError: broken while a process runs"


CUDA_ERROR = """some warning
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    fails()
    ^^^^^^^
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in step
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
"""


def test_the_note_of_a_failed_stage_is_its_error():
    expected = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
    assert running.last_line(CUDA_ERROR) == expected
    stack = "Current thread 0x1 (most recent call first):\n  File a, line 3 in f\n  File b\n"
    assert running.last_line(f"noise\n{stack}") == "File a, line 3 in f"
    assert running.last_line("one\ntwo") == "two"
    assert running.last_line("") == "it printed nothing on stderr"


def test_the_names_of_kernels_are_short():
    name = "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float*, int)"
    assert attention.short(name) == "cunn_SoftMaxForward<4, float>"
    name = (
        "fmha_cutlassF_f32_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>)"
    )
    assert attention.short(name) == "fmha_cutlassF_f32_aligned_64x128_rf_sm80"


def test_rows_say_whether_a_bound_holds():
    assert at_most("a", 1, 1).passed and not at_most("a", 1.01, 1).passed
    assert at_least("a", 1, 1).passed and not at_least("a", 0.99, 1).passed
    assert not at_most("a", float("nan"), 1).passed and not at_least("a", float("nan"), 1).passed
    assert holds("a", True).verdict == "PASS" and holds("a", False).verdict == "FAIL"
    assert not_run("a").verdict == "not run" and not_run("a").note == "needs CUDA"
    assert to_json(Row("a", torch.tensor(2.0)))["value"] == 2.0


def test_the_sizes_of_a_gpu_do_not_run_on_a_cpu():
    with pytest.raises(InputError, match="pass --small"):
        proof.main(["--device", "cpu"])


def test_every_stage_can_be_imported_on_a_bare_machine():
    """A PyTorch machine has none of these packages, and the proof must run there."""
    absent = ["SimpleITK", "nibabel", "tensorboardX", "medpy", "icecream", "pydicom"]
    script = "import sys, importlib\n"
    script += f"sys.modules |= dict.fromkeys({absent})\n"
    script += "from benchmarks.gpu.__main__ import STAGES\n"
    script += "for target, _ in STAGES.values():\n"
    script += "    module, name = target.split(':')\n"
    script += "    assert getattr(importlib.import_module(module), name).__doc__\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_page_shows_the_proof(tmp_path: Path):
    rows = [to_json(at_most("error | of a", 0.5, 1, "mm")), to_json(not_run("b"))]
    where = {"device": "card", "date": "d", "python": "3", "torch": "2", "commit": "c"}
    content = {"where": where | {"versions": {}}, "stages": {"s": {"rows": rows}}}
    (tmp_path / table.PROOF).write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text(f"{table.START}\n{table.END}\n")
    table.update_page(page, tmp_path)
    text = page.read_text()
    assert "| s | error / of a | 0.5 mm | ≤ 1 | PASS |" in text
    assert "| s | b | – |  | not run: needs CUDA |" in text and "card, d, Python 3" in text
    assert report.counts(content) == "1 PASS, 0 FAIL, 0 figure, 1 not run"


@pytest.mark.parametrize("window", [14, None])
def test_the_stage_of_attention_sees_a_wrong_gradient(
    window: int | None, monkeypatch: pytest.MonkeyPatch
):
    row = attention.attention_row(CPU.device, 15, window, 64, torch.float32)
    assert row.passed and row.value < 1e-5
    assert "_scaled_dot_product_attention" in row.note
    # Then the gradients of two runs are added.
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self: None)
    assert not attention.attention_row(CPU.device, 15, window, 64, torch.float32).passed


def test_a_wait_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch):
    """On a fake GPU that refuses the second time, as PyTorch does in this mode."""
    modes, calls = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def steps() -> None:
        calls.append(modes[-1:])
        if modes:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    row = syncs.waits_for_nothing("steps", steps, torch.device("cuda"))
    assert row.passed is False and calls == [[], ["error"]] and modes == ["error", "default"]
    assert row.note.startswith("called a synchronizing CUDA operation, in test_gpu_proof.py:")
    assert syncs.waits_for_nothing("steps", lambda: None, torch.device("cuda")).passed


def test_the_digest_sees_every_bit():
    state = {"a": [torch.tensor([1.0, 2.0])], "lr": 0.1}
    same = {"a": [torch.tensor([1.0, 2.0])], "lr": 0.1}
    assert repeats.digest(state) == repeats.digest(same)
    others = [
        {"a": [torch.tensor([1.0, 2.0 + 2.4e-7])], "lr": 0.1},
        {"a": [torch.tensor([1.0, 2.0])], "lr": 0.1000001},
        {"a": [torch.tensor([1.0, 2.0], dtype=torch.float64)], "lr": 0.1},
        {"a": [torch.tensor([-0.0])]},
        {"a": [torch.tensor([0.0])]},
    ]
    assert len({repeats.digest(content) for content in [state, *others]}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["machine", "attention", "syncs", "repeats", "memory"])
def test_a_small_stage_runs_to_its_end(name: str, tmp_path: Path):
    output = tmp_path / "o.json"
    code = proof.main(["--small", "--device", "cpu", "--only", name, "--output", str(output)])
    rows = json.loads(output.read_text())["stages"][name]["rows"]
    assert code == 0 and rows and all(row["what"] != running.TO_THE_END for row in rows)
