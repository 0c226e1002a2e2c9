"""Commands: exit codes, one line for the user's mistakes, threads."""

import logging

import pytest
import torch

from library import cli
from library.errors import UserError


def _fails(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_user_errors_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run_main(_fails(UserError("--ae a b.txt: broken;\n get another")))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --ae a b.txt: broken; get another\n"


def test_interrupt_is_130_and_faults_keep_their_traceback() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run_main(_fails(KeyboardInterrupt()))
    assert caught.value.code == 130
    with pytest.raises(ZeroDivisionError):
        cli.run_main(_fails(ZeroDivisionError()))


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli.set_up_logging()
    logging.getLogger("library.x").info("first")
    cli.say("result")
    monkeypatch.setenv("RANK", "1")
    cli.set_up_logging()
    logging.getLogger("library.x").warning("second")
    cli.say("second")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("result\n", "first\n")


def test_threads_are_shared_among_local_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert cli.set_threads(3) == 3 == torch.get_num_threads()
        monkeypatch.setattr(cli.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert cli.set_threads() == 4
    finally:
        torch.set_num_threads(before)
