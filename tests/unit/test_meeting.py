"""What ranks say that wait for others."""

from __future__ import annotations

import socket
import time

import pytest

from hive_ds.launch.meeting import late_is_said


@pytest.mark.parametrize(
    ("host", "waited_for", "said"),
    [
        ("127.0.0.1", "", "rank 1 on node2 still waits for rank 0 at 127.0.0.1:{port}: Connection refused\n"),
        ("nobody.invalid", "", "rank 1 on node2 still waits for rank 0 at nobody.invalid:{port}: "),
        ("127.0.0.1", "all 2 ranks", "rank 1 on node2 still waits for all 2 ranks at 127.0.0.1:{port}\n"),
    ],
)
def test_who_is_waited_for_is_said_once(
    host: str, waited_for: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        port = taken.getsockname()[1]
        with late_is_said("rank 1 on node2", host, port, waited_for=waited_for, patience=0.1):
            deadline, printed = time.monotonic() + 30, ""
            while not printed and time.monotonic() < deadline:
                time.sleep(0.1)
                printed = capsys.readouterr().err
    assert printed.startswith(said.format(port=port))
    assert printed.count("\n") == 1


def test_nothing_is_said_where_rank_0_answers_or_nobody_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with late_is_said("rank 1 on node2", "127.0.0.1", port, patience=0.05):
            server.accept()[0].close()
            time.sleep(0.2)
    with late_is_said("rank 1 on node2", "127.0.0.1", 1, patience=0.3):
        pass
    time.sleep(0.5)
    assert capsys.readouterr().err == ""
