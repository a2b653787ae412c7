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
    with progress.shown("classifier", 3) as advance:
        advance(1, "loss 0.5")
        advance(2, "loss 0.4")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("classifier 1/3 loss 0.5, ")
    assert lines[0].endswith(" s left")
    assert lines[-1].startswith("classifier ")
    assert "3/3 loss 0.4" in lines[-1]
