import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rayseg.config import Config
from rayseg.engine import run as runs
from rayseg.engine.ledger import Account, Ledger, Record
from rayseg.engine.run import Engine, Run
from rayseg.errors import ConfigError
from rayseg.geo.region import Region

CALLS = []


class Options(Config):
    rate: float = 0.1


def work(step, options, *before):
    CALLS.append(step.name)
    step.prefix.mkdir(parents=True, exist_ok=True)
    (step.prefix / "made").write_text(str(options.rate))
    return {"rate": options.rate}


def fall(step, options):
    (step.prefix / "part").write_text("half")
    raise OSError("power cut")


def trouble(step):
    CALLS.append(step.name)
    return {"troubles": {} if step.engine.retry else {"t1": "damaged"}}


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def opened(out, *, options=None, region="r", engine=None):
    return Run.open(str(out), pipeline="p", config=options or Options(), region=Region(region), engine=engine)


def test_a_finished_step_is_not_done_again(tmp_path):
    for _ in range(2):
        with opened(tmp_path / "run") as run:
            first = run.step("a", work, Options())
            run.step("b", work, Options(), first)
    assert CALLS == ["a", "b"]
    assert runs.read(str(tmp_path / "run"))["status"] == "done"
    assert runs.read(str(tmp_path / "run"))["steps"]["a"]["rate"] == 0.1


def test_a_step_is_done_again_when_its_settings_or_inputs_change(tmp_path):
    for rate in (0.1, 0.2):
        with opened(tmp_path / "run") as run:
            first = run.step("a", work, Options(rate=rate))
            run.step("b", work, Options(), first)
    assert CALLS == ["a", "b", "a", "b"]


def test_what_the_check_found_reaches_a_step_and_not_its_key(tmp_path):
    def find(step, *, listed=None):
        return {"listed": listed or "by itself"}

    for check in (lambda: ["a"], None):
        with Run.open(str(tmp_path / "run"), pipeline="p", config=Options(), region=Region("r"), check=check) as run:
            assert run.step("find", find, listed=run.plan).value == {"listed": ["a"]}
    with opened(tmp_path / "other") as run:
        assert run.step("find", find, listed=run.plan).value == {"listed": "by itself"}


def test_a_path_of_the_run_in_the_settings_of_a_step_keeps_its_key_when_the_run_is_moved(tmp_path):
    def paths(run):
        return {"catalogue": f"{run.root}/enlarged/collection.json"}

    with opened(tmp_path / "run") as run:
        run.step("b", name_files, run.step("a", name_files, paths(run)))
    (tmp_path / "run").rename(tmp_path / "moved")
    with opened(tmp_path / "moved") as run:
        run.step("b", name_files, run.step("a", name_files, paths(run)))
    assert CALLS == ["a", "b"]


def test_a_run_whose_keys_hold_its_path_goes_on_with_them(tmp_path, monkeypatch):
    def steps(name, run):
        first = run.step("a", name_files, f"{run.root}/enlarged")
        if name == "b":
            run.step("b", name_files, first)

    with monkeypatch.context() as earlier, opened(tmp_path / "run") as run:
        keys = Run._keys
        earlier.setattr(Run, "_keys", lambda *given: keys(*given)[1:] * 2)
        steps("a", run)
        steps("b", run)
    with opened(tmp_path / "run") as run:
        steps("b", run)
    assert CALLS == ["a", "b"]


def test_an_interrupted_step_resumes_from_its_files(tmp_path):
    with pytest.raises(OSError, match="power cut"), opened(tmp_path / "run") as run:
        run.step("a", fall, Options())
    assert runs.read(str(tmp_path / "run"))["status"] == "stopped"
    assert "power cut" in runs.read(str(tmp_path / "run"))["reason"]
    assert (tmp_path / "run/steps/a/part").exists()


def test_files_of_other_settings_are_removed(tmp_path):
    with pytest.raises(OSError, match="power cut"), opened(tmp_path / "run") as run:
        run.step("a", fall, Options())
    with opened(tmp_path / "run") as run:
        run.step("a", work, Options())
    assert not (tmp_path / "run/steps/a/part").exists()


def test_troubles_leave_the_run_incomplete_until_a_retry(tmp_path):
    with opened(tmp_path / "run") as run:
        run.step("a", trouble)
    assert run.troubles == {"a": {"t1": "damaged"}}
    assert runs.read(str(tmp_path / "run"))["status"] == "incomplete"
    with opened(tmp_path / "run") as run:
        run.step("a", trouble)
    with opened(tmp_path / "run", engine=Engine(retry=True)) as run:
        run.step("a", trouble)
    assert CALLS == ["a", "a"]
    assert runs.read(str(tmp_path / "run"))["status"] == "done"


def test_an_output_of_other_settings_is_refused_and_left_alone(tmp_path):
    with opened(tmp_path / "run"):
        pass
    before = (tmp_path / "run/run.json").read_bytes()
    with (
        pytest.raises(ConfigError, match=r"config.rate is 0.1 there, 0.2 here.*--out"),
        opened(tmp_path / "run", options=Options(rate=0.2)),
    ):
        pass
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="is not a rayseg run"), opened(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ConfigError, match="cannot be written"), opened(tmp_path / "locked" / "run"):
        pass


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"), opened(tmp_path / "file" / "run"):
        pass


def test_two_processes_cannot_work_on_one_run(tmp_path):
    with opened(tmp_path / "run"), pytest.raises(ConfigError, match="another process"), opened(tmp_path / "run"):
        pass
    with opened(tmp_path / "run"):
        pass


OTHER_COMMAND = """
import sys
sys.path.insert(0, {tests!r})
from test_run import Options, opened
with opened({out!r}, options=Options(rate=0.1)):
    pass
"""


def test_a_run_that_another_process_begins_during_the_check_is_not_overwritten(tmp_path):
    """Both commands find an empty folder; only the one that holds the lock first may own it."""
    out, before = tmp_path / "run", []

    def other_command():
        code = OTHER_COMMAND.format(tests=str(Path(__file__).parent), out=str(out))
        subprocess.run([sys.executable, "-c", code], check=True)
        before.append((out / "run.json").read_bytes())

    late = Run.open(str(out), pipeline="p", config=Options(rate=0.2), region=Region("r"), check=other_command)
    with pytest.raises(ConfigError, match=r"belongs to another run \(config.rate is 0.1 there, 0.2 here"), late:
        pytest.fail("the second command began")
    assert [(out / "run.json").read_bytes()] == before
    same = Run.open(str(out), pipeline="p", config=Options(), region=Region("r"), check=pytest.fail)
    with same:  # the same run resumes, without a check
        pass


def name_files(step, *_):
    CALLS.append(step.name)
    return {"bundle": f"{step.root}/models/m", "other": [f"{Path(step.root).parent}/a-2/m", "/elsewhere"]}


def test_a_moved_run_finds_its_own_files(tmp_path):
    for place in ("a", "b"):
        with opened(tmp_path / place) as run:
            step = run.step("first", name_files)
            run.step("second", name_files, step)
        assert step.value["bundle"] == f"{tmp_path}/{place}/models/m"
        assert step.value["other"] == [f"{tmp_path}/a-2/m", "/elsewhere"]
        (tmp_path / place).rename(tmp_path / "b")
    assert CALLS == ["first", "second"]


def test_partial_files_are_removed_when_a_run_succeeds(tmp_path):
    with pytest.raises(OSError, match="power cut"), opened(tmp_path / "run") as run:
        run.step("a", fall, Options())
    half = tmp_path / "run" / "steps" / "a" / ".made.01234567.part"
    half.touch()
    with pytest.raises(OSError, match="power cut"), opened(tmp_path / "run") as run:
        run.step("a", fall, Options())
    assert half.exists()  # other processes may still write
    with opened(tmp_path / "run"):
        pass
    assert not half.exists()


def test_an_output_on_a_store_without_credentials_is_refused(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigError, match="Unable to locate credentials"), opened("s3://bucket/run"):
        pass


def test_a_folder_without_a_run_has_no_status(tmp_path):
    with pytest.raises(ConfigError, match="is not a run"):
        runs.status(str(tmp_path))


def test_the_latest_attempt_counts_and_nothing_is_overwritten(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger"))
    assert ledger.read() == {}
    assert ledger.write(Record("t1", "failed", "bad"))
    assert not ledger.write(Record("t1", "done"))
    assert ledger.write(Record("t1", "done", attempt=2))
    assert ledger.read()["t1"].status == "done"
    assert json.loads((tmp_path / "ledger/t1.1.json").read_text())["reason"] == "bad"


def test_an_account_adds_up():
    records = {"a": Record("a", "done"), "b": Record("b", "failed", "x"), "z": Record("z", "done")}
    account = Account.of(["a", "b", "c"], records)
    assert sum(account.counts.values()) == account.planned == 3
    assert account.troubles == {"b": "x", "c": "not processed"}
    assert str(account) == "3 planned = 1 done + 1 failed + 1 missing"
