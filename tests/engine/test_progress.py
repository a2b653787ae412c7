"""Progress of long work on stderr, for people and for programs."""

import json

from rayseg.engine import progress


def test_lines_of_json_state_what_is_done_and_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "as_json", True)
    clock = iter([100.0, 101.0, 102.0, 115.0, 116.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.shown("tiles", 8) as advance:
        advance(1, "0 failed")
        advance(1, "0 failed")  # a second later: no line
        advance(2, "1 failed")
        advance(4, "1 failed")
    rows = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(row["done"], row["text"], row["seconds"], row["left"]) for row in rows] == [
        (1, "0 failed", 1.0, 7.0),
        (4, "1 failed", 15.0, 15.0),
        (8, "1 failed", 16.0, 0.0),
    ]
    assert {(row["work"], row["total"]) for row in rows} == {("tiles", 8)}


def test_where_there_is_no_terminal_a_line_comes_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.shown("classifier", 3, unit="epoch") as advance:
        advance(1, "loss 0.5")
        advance(2, "loss 0.4")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("classifier: epoch 1/3, loss 0.5, ")
    assert first.endswith(" s left")
    assert last == "classifier: epoch 3/3, loss 0.4"


def test_work_in_a_step_names_the_step_and_a_step_leaves_a_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "AT_ONCE", 0.0)
    with progress.step(4, "segmenter"):
        with progress.shown("segmenter warm up", 2, unit="epoch") as advance:
            advance(2, "loss 0.5")
        with progress.shown("tiles", 2) as advance:
            advance(2, "0 failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["4 segmenter, warm up: epoch 2/2, loss 0.5", "4 segmenter: tiles 2/2, 0 failed"]
    assert lines[2].startswith("4 segmenter: done in ")
    monkeypatch.setattr(progress, "as_json", True)
    with progress.step(5, "predict"), progress.shown("tiles", 1) as advance:
        advance(1)
    work, step = map(json.loads, capsys.readouterr().err.splitlines())
    assert (work["work"], work["step"], work["number"]) == ("tiles", "predict", 5)
    assert (step["step"], step["number"]) == ("predict", 5)
    with progress.shown("tiles", 1) as advance:
        advance(1)
    assert "step" not in json.loads(capsys.readouterr().err)


def test_time_left_is_in_the_unit_that_fits():
    assert [progress._duration(seconds) for seconds in (4.26, 42.4, 89, 100, 3600, 9000)] == [
        *("4.3 s", "42 s", "89 s", "2 min", "60 min", "2 h 30 min"),
    ]
