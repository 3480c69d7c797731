"""Which folders are runs, what a run folder still holds, and files in it that were damaged."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from common.errors import InputError
from config.flags import train_parser
from config.run_folder import (
    differences,
    find_run,
    fingerprint_data,
    fingerprint_weights,
    read_config_file,
    read_run,
    run_name,
    runs_in,
    save_config,
)
from config.settings import config_path, parse_args
from datasets.prepared_files import SampleFacts
from training.checkpoint import STATES, newest_state, saved_states
from training.curves import draw_curves, read_metrics
from training.resuming import earlier_starts, has_state, set_aside, unlike_before
from training.run_log import METRICS, RunLog

HUGGING_FACE = {"model_type": "bert", "hidden_size": 768}


def run_in(output: Path, name: str, **values: object) -> Path:
    """Make the folder of a run that has only begun."""
    folder = output / name
    folder.mkdir(parents=True)
    args = argparse.Namespace(**(vars(train_parser().parse_args([])) | values))
    save_config(args, folder)
    return folder


def write_config(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


# --- which folders are runs -------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [HUGGING_FACE, {"seed": 1, "model": "x"}, {}, []])
def test_a_folder_of_another_program_is_no_run(foreign: object, tmp_path: Path):
    other = write_config(tmp_path / "other", foreign)
    run = run_in(tmp_path, "run")
    os.utime(other / "config.json", (2e9, 2e9))
    assert runs_in(tmp_path) == [run]
    assert config_path(str(tmp_path)) == run / "config.json"
    with pytest.raises(InputError, match="config"):
        config_path(str(other))
    args = argparse.Namespace(resume=str(other), output=str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json"):
        find_run(args)


def test_a_file_of_flags_may_be_a_recipe_but_not_a_foreign_configuration(tmp_path: Path):
    recipe, foreign = tmp_path / "recipe.json", tmp_path / "foreign.json"
    recipe.write_text('{"rank": 6}')
    foreign.write_text(json.dumps(HUGGING_FACE))
    argv = ["--root_path", str(tmp_path), "--vit_name", "vit_tiny", "--ckpt", "none", "--config"]
    assert parse_args(train_parser(), [*argv, str(recipe)]).rank == 6
    with pytest.raises(InputError, match=r"no flag of train\.py"):
        parse_args(train_parser(), [*argv, str(foreign)])


def test_a_run_of_version_1_0_is_a_run():
    (config,) = (Path(__file__).parent / "files_of_1_0" / "encoder").glob("*/config.json")
    assert "program" not in read_run(config.parent)


def test_the_newest_run_is_the_one_started_last_although_the_clock_was_set_back(tmp_path: Path):
    for number, name in enumerate(("c", "b", "a")):
        os.utime(run_in(tmp_path, name) / "config.json", (10**9 - number, 10**9 - number))
    assert [run.name for run in runs_in(tmp_path)] == ["c", "b", "a"]
    save_config(argparse.Namespace(**read_run(tmp_path / "c")), tmp_path / "c")  # it goes on
    assert [run.name for run in runs_in(tmp_path)] == ["b", "a", "c"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "\0\0\0\0", '{"rank": 4, "max_epochs": ' + "9" * 5000 + "}", "[" * 100_000, '"x"'],
    ids=["empty", "cut", "NUL", "huge", "nested", "text"],
)
def test_a_damaged_configuration_is_told(content: str, tmp_path: Path, capsys):
    run = run_in(tmp_path, "run")
    (run / "lock").touch()
    write_config(run, content)
    with pytest.raises(InputError, match=r"config\.json"):
        find_run(argparse.Namespace(resume=str(run)))
    assert runs_in(tmp_path) == []
    warned = capsys.readouterr().err
    assert "is left out" in warned and str(run) in warned and warned.count("\n") == 1


@pytest.mark.parametrize("wrong", [{"n_gpu": None}, {"batch_size": "x"}, {"spec": 3}, {"code": 1}])
def test_auto_passes_over_a_run_with_impossible_settings(wrong: dict, tmp_path: Path):
    run = run_in(tmp_path, "run", code={}, data=None, weights=None, spec={})
    write_config(run, read_run(run) | wrong | {"rank": 77})
    args = argparse.Namespace(**(read_run(run) | {"rank": 4, "batch_size": 12, "n_gpu": 2}))
    args.code, args.spec, args.same_code = {}, {}, False
    args.resume, args.output = "auto", str(tmp_path)
    assert find_run(args) is None


# --- fingerprints -----------------------------------------------------------------------------


def facts_of(*names: str, label: str = "l") -> list[SampleFacts]:
    return [SampleFacts(name, (4, 4), False, 0, 1, (8, 8), f"i{name}", (), label) for name in names]


def found(saved: object, now: object, name: str = "data") -> list[str]:
    """Return the differences of two runs that differ in one fingerprint at most."""
    same = {"batch_size": 1, "n_gpu": 1, "code": {}, "same_code": False}
    return differences(same | {name: saved}, argparse.Namespace(**same, **{name: now}))


def test_the_fingerprint_of_the_data_sees_all_that_decides_the_numbers():
    names = ["a", "b", "c"]
    first = fingerprint_data(facts_of(*names), names, {})
    assert found(first, fingerprint_data(facts_of("c", "b", "a"), names, {})) == []
    for now, told in (
        (fingerprint_data(facts_of(*names, label="m"), names, {}), "data (labels)"),
        (fingerprint_data(facts_of(*names), ["b", "a", "c"], {}), "data (order)"),
        (fingerprint_data(facts_of(*names), names, {"c": ["c"]}), "data (held out)"),
        (fingerprint_data(facts_of("a", "b"), names, {}), "data 3 slices"),
    ):
        (text,) = found(first, now)
        assert text.startswith(told)


def test_fingerprints_of_older_runs_are_compared_as_far_as_they_know():
    names = ["a", "b", "c"]
    now = fingerprint_data(facts_of(*names), names, {})
    assert found(now["slices"], now) == []
    assert found(None, now) == []
    assert found("3 slices 0123456789ab", now)
    assert found([1], now) and found({"slices": 4}, now)


def test_fingerprints_of_weights_are_compared_as_far_as_both_know():
    neck, whole = "a" * 16, "b" * 16
    assert found(neck, neck + whole, "weights") == []
    assert found(f"{neck} and c", f"{neck}{whole} and c", "weights") == []
    for now in (neck + "c" * 16, f"{neck}{whole} and c", "none"):
        (text,) = found(neck + whole, now, "weights")
        assert text.startswith("weights ")
    assert fingerprint_weights(None, None) == "none"


# --- what a run folder still holds ------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as of a run whose states are gone."""
    folder = run_in(tmp_path, "run")
    (folder / "lock").touch()
    (folder / METRICS).write_text('{"step": 0, "loss": 1.0, "lr": 0.1}\n')
    (folder / "epoch_19.pth").write_bytes(b"adapter")
    return folder


def state_in(folder: Path, name: str = "step_0000003-0123456789abcdef.pth") -> Path:
    (folder / STATES).mkdir(exist_ok=True)
    (folder / STATES / name).write_bytes(b"state")
    return folder / STATES / name


def test_results_without_states_are_refused_and_kept(run: Path):
    for gone in (None, "epoch_19.pth", METRICS):
        if gone:
            (run / gone).rename(run.parent / gone)
        if gone == METRICS:  # Nothing was trained.
            assert not has_state(run)
            continue
        with pytest.raises(InputError, match="--restart") as caught:
            has_state(run)
        assert METRICS in str(caught.value) and "\n" not in str(caught.value)
    (run / METRICS).touch()
    assert not has_state(run)
    state_in(run)
    assert has_state(run)


def test_a_damaged_state_that_was_set_aside_is_not_forgotten(run: Path):
    state_in(run, "step_0000003-0123456789abcdef.damaged")
    assert has_state(run)
    with pytest.raises(InputError, match="every saved state"):
        newest_state(run)


def test_states_that_cannot_be_listed_are_told(run: Path):
    (run / STATES).write_text("no folder")
    with pytest.raises(InputError, match=r"the states in .* cannot be read"):
        has_state(run)


def test_restart_keeps_everything_in_a_folder_of_its_own(run: Path):
    state_in(run)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for number in (1, 2):
        kept = set_aside(run)
        assert kept == run / f"before-{number}"
        assert not saved_states(run) and not has_state(run)
    left = {path.name for path in run.iterdir()}
    assert left == {"lock", "config.json", "before-1", "before-2"}
    for path, content in before.items():
        assert path.name == "lock" or (run / "before-1" / path).read_bytes() == content


def test_restart_needs_a_folder(tmp_path: Path):
    argv = ["--root_path", str(tmp_path), "--vit_name", "vit_tiny", "--ckpt", "none", "--restart"]
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(InputError, match="--restart needs --resume FOLDER"):
            parse_args(train_parser(), [*argv, *more])


# --- damaged files ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[", "\0", "{}", "[1]", "[" * 100_000, "[1e999]"])
def test_a_damaged_list_of_starts_is_begun_anew_and_kept(content: str, tmp_path: Path, capsys):
    path = tmp_path / "environment.json"
    path.write_text(content)
    assert earlier_starts(path) == []
    assert (tmp_path / "environment.json.damaged").read_text() == content and not path.exists()
    assert "environment.json" in capsys.readouterr().err
    path.write_text('[{"processes": 2}]')
    assert earlier_starts(path) == [{"processes": 2}]


def test_other_numbers_of_processes_and_threads_are_told():
    assert unlike_before([], {"processes": 1}) is None
    assert unlike_before([{"processes": 1}], {"processes": 1, "threads": 2}) is None
    before, now = {"processes": 2, "threads": 1}, {"processes": 1, "threads": 4}
    told = unlike_before([before], now)
    assert told.startswith("2 processes before, 1 now, 1 threads before, 4 now") and "round" in told


LINES = [f'{{"step": {step}, "loss": 1.5, "lr": 0.1}}\n' for step in range(4)]
POSITION = {"epoch_losses": [], "last_loss": 1.0, "skipped": 0}


@pytest.mark.parametrize(
    ("content", "kept", "warned"),
    [
        ("".join(LINES), 3, False),
        ("".join(LINES[:2]), 2, True),
        ("".join(LINES)[: len(LINES[0]) + 9], 1, True),
        (None, 0, True),
    ],
    ids=["longer", "shorter", "cut in a line", "gone"],
)
def test_the_log_goes_on_at_the_end_of_a_line(content, kept: int, warned: bool, tmp_path, caplog):
    if content is not None:
        (tmp_path / METRICS).write_text(content)
    position = POSITION | {"bytes": sum(map(len, LINES[:3]))}
    with RunLog(tmp_path, every=1, position=position, step=3) as log:
        log.write({"step": 3})
        assert log.position()["bytes"] == (tmp_path / METRICS).stat().st_size
    expected = [*map(json.loads, LINES[:kept]), {"step": 3}]
    assert read_metrics(tmp_path) == expected
    assert ("was shortened or edited" in caplog.text) == warned


@pytest.mark.parametrize("how", ["deleted", "replaced", "folder deleted", "second writer"])
def test_a_run_notices_that_its_folder_is_no_longer_its_own(how: str, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RunLog(folder, every=1) as log:
        log.write({"step": 0})
        log.position()
        path = folder / METRICS
        if how == "deleted":
            path.unlink()
        elif how == "replaced":
            path.rename(folder / "moved")
            path.write_text(LINES[0])
        elif how == "folder deleted":
            folder.rename(tmp_path / "moved")
        else:
            with path.open("a") as other:
                other.write(LINES[0])
        with pytest.raises(InputError, match="so th") as caught:
            log.position()
    assert str(folder) in str(caught.value)


def test_a_log_that_someone_shortened_goes_on(tmp_path: Path):
    with RunLog(tmp_path, every=1) as log:
        for _ in range(3):
            log.write({"step": 0})
        log.position()
        (tmp_path / METRICS).write_text("")
        log.write({"step": 1})
        assert log.position()["bytes"] == len('{"step": 1}\n')


def test_curves_are_drawn_from_what_is_readable(tmp_path: Path, capsys):
    odd = [
        "no JSON", "[]", "\0\0", '{"step": ' + "9" * 400 + "}", '{"step": "x", "loss": 1, "lr": 1}',
        '{"step": 1, "loss": 1}', '{"step": 1, "loss": 1e300, "lr": 1}', '{"epoch": 1, "score": 1}',
        '{"epoch": 1, "score": 0.5, "dsc": [0.5]}', '{"epoch": 1, "score": 0.5, "dsc": ["", null]}',
        '{"steps": 4, "mean_loss": null}', "{}",
    ]  # fmt: skip
    (tmp_path / METRICS).write_text("\n".join([*odd, *LINES]), encoding="utf-8")
    assert draw_curves(tmp_path, ["a", "b"]).is_file()
    assert "is damaged in 4 line(s), first 1" in capsys.readouterr().err
    (tmp_path / METRICS).unlink()
    assert draw_curves(tmp_path, ["a", "b"]).is_file()


@pytest.mark.parametrize(
    ("recorded", "optimizer", "augment"),
    [
        ({"AdamW": True, "no_augment": False}, "adamw", "samed"),
        ({"AdamW": False, "no_augment": True}, "sgd", "none"),
        ({"AdamW": False, "optimizer": "adamw", "augment": "none"}, "adamw", "none"),
    ],
)
def test_runs_of_earlier_versions_recorded_switches(
    tmp_path: Path, recorded: dict[str, object], optimizer: str, augment: str
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(recorded | {"rank": 4}))
    found = read_config_file(path)
    assert (found["optimizer"], found["augment"]) == (optimizer, augment)
    assert "AdamW" not in found
    path.write_text(json.dumps({"AdamW": True, "optimizer": "sgd", "rank": 4}))
    with pytest.raises(InputError, match="contradict each other"):
        read_config_file(path)


def test_a_run_that_lacks_a_setting_had_its_default(tmp_path: Path):
    """Runs of earlier versions know no knobs, and were trained as published."""
    folder = run_in(tmp_path, "run", code={}, trained_on=None, same_code=True)
    saved = read_run(folder)
    for name in ("loss", "ema", "lora_targets", "input_slices", "fresh_heads"):
        del saved[name]
    plain = argparse.Namespace(**(saved | {"code": {}, "same_code": True}))
    for name in ("loss", "ema", "lora_targets", "input_slices"):
        setattr(plain, name, train_parser().get_default(name))
    plain.fresh_heads = True  # as `parse_args` continues runs of the time before this flag
    assert differences(saved, plain) == []
    plain.loss, plain.ema, plain.lora_targets, plain.input_slices = "dice", 0.9, ["k"], 3
    found = " ".join(differences(saved, plain))
    assert all(f"--{name}" in found for name in ("loss", "ema", "lora_targets", "input_slices"))


def test_a_long_name_of_a_run_fits_a_file_system():
    args = train_parser().parse_args(["--vit_name", "vit_h", "--dataset", "é" * 20])
    args.lora_blocks = [str(block) for block in range(0, 31)] + ["31"]
    names = set()
    for args.base_lr in (0.1, 0.2):
        args.note = "x" * 60
        name = run_name(args)
        assert len(name.encode()) <= 200 and name.startswith("ééé")
        names.add(name)
    assert len(names) == 2
