"""What is shown while an exporter works."""

import io
import logging
import time

import pytest

from raftmlp.export import stages
from raftmlp.export.stages import show_stage


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_where_there_is_no_terminal(caplog, capsys):
    with caplog.at_level(logging.INFO, "raftmlp"), show_stage("making a file"):
        pass
    assert caplog.messages == ["making a file ..."] and capsys.readouterr().err == ""


def test_a_spinner_with_seconds_on_a_terminal(monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(stages, "INTERVAL", 0.01)
    with caplog.at_level(logging.INFO, "raftmlp"), show_stage("making a file"):
        end = time.perf_counter() + 5
        while "/ making a file, 0 s" not in terminal.getvalue() and time.perf_counter() < end:
            time.sleep(0.01)
    shown = terminal.getvalue()
    assert "| making a file, 0 s" in shown and "/ making a file, 0 s" in shown and not caplog.messages
    assert shown.endswith("\r") and not shown.rsplit("\r", 2)[1].strip()  # the line is empty again
    time.sleep(0.05)
    assert terminal.getvalue() == shown


def test_the_spinner_ends_with_an_error(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(KeyError), show_stage("making a file"):
        raise KeyError
