from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from histill import __version__, cli
from histill.errors import DataError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Put one command ``fake`` into the table, which runs the given function."""

    def put(run: Callable[[list[str]], int]) -> None:
        module = type(sys)("histill_fake_command")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "histill_fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("histill_fake_command", "a command for the test"))

    return put


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_with_its_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in cli.COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, text] for line in lines)


def test_nothing_prints_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "usage: histill COMMAND" in printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"histill {__version__}\n"


def test_an_unknown_command_exits_2_with_the_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distil"]) == 2
    err = capsys.readouterr().err
    assert "there is no command 'distil'" in err
    assert "did you mean distill" in err
    assert cli.main(["zzzzzz"]) == 2
    assert "see histill --help" in capsys.readouterr().err


def test_a_command_gets_its_arguments_and_gives_its_status(
    command: Callable[[Callable[[list[str]], int]], None],
) -> None:
    seen: list[list[str]] = []

    def run(argv: list[str]) -> int:
        seen.append(argv)
        return 3

    command(run)
    assert cli.main(["fake", "--a", "b"]) == 3
    assert seen == [["--a", "b"]]


def test_a_users_error_is_printed_without_a_traceback(
    command: Callable[[Callable[[list[str]], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        raise DataError("no tiles here", where="folder/", remedy="give another folder")

    command(run)
    assert cli.main(["fake"]) == 1
    assert capsys.readouterr().err == ("error: no tiles here\n  where:   folder/\n  remedy:  give another folder\n")


def test_a_programming_error_keeps_its_traceback(command: Callable[[Callable[[list[str]], int]], None]) -> None:
    def run(argv: list[str]) -> int:
        raise ValueError("not a user's fault")

    command(run)
    with pytest.raises(ValueError, match="not a user's fault"):
        cli.main(["fake"])


def test_an_interrupt_exits_130(
    command: Callable[[Callable[[list[str]], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    command(run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        assert cli.main(["fake"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_python_dash_m_passes_status_and_text_on() -> None:
    done = subprocess.run([sys.executable, "-m", "histill", "distil"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no command 'distil'")


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    code = (
        "import sys, types; from histill import cli\n"
        "def run(argv):\n"
        "    for _ in range(100_000): print('a line that is long enough to fill the pipe')\n"
        "    return 0\n"
        "fake = types.ModuleType('fake_command'); fake.run = run; sys.modules['fake_command'] = fake\n"
        "cli.COMMANDS['fake'] = ('fake_command', ''); sys.exit(cli.main(['fake']))\n"
    )
    read_end, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    os.read(read_end, 10)
    os.close(read_end)
    _, err = process.communicate()
    assert (process.returncode, err) == (141, "")
