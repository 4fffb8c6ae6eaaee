"""Which of a job's nodes the scripts train on, by what their checks leave behind; on real Slurm in tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm_stand_in import KNOWN, edit, lines, make_site, train, trained_on


@pytest.fixture(autouse=True)
def in_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_site(tmp_path / "a site")
    monkeypatch.chdir(tmp_path / "a site")


ANSWER = KNOWN["CHECK"]
THREE = {"NODES": "n1 n2 n3"}


def of(node: str, what: str) -> str:
    """A part of the check of all, or of another, for a step that is on this node."""
    return f'[[ " $on " != *" {node} "* ]] || {{ {what}; }}'


def nodes_that_train() -> list[str]:
    words = trained_on()
    assert words[:2] == ["--nodes", str(len(words[7].split(",")))]
    return words[7].split(",")


def test_the_first_good_nodes_train_and_the_bad_one_is_named() -> None:
    bad = of("n1", 'echo "its disk is full" >"$checks/n1.fault"')
    train_and_say = f'echo "$HIVE_MASTER" >master; {KNOWN["TRAIN"]}'
    done = train("--spares", "2", NODES="n1 n2 n3 n4", CHECK=f"{ANSWER}; {bad}", TRAIN=train_and_say)
    assert done.returncode == 0, done.stdout + done.stderr
    assert nodes_that_train() == ["n2", "n3"]
    assert lines("master") == ["n2"]
    assert "preflight: 3 of 4 nodes are good, 2 needed" in done.stdout
    assert "all-reduce of 2 nodes: 1.00 GB/s" in done.stdout
    assert "n1: its disk is full\n" in done.stdout


def test_what_the_checks_are_started_with() -> None:
    """A process a node with all its GPUs, in the container, beside whatever is left of an earlier step."""
    edit("HIVE_SCRATCH='/a scratch' HIVE_SRUN=(--container-image='a b')")
    assert train(SLURM_GPUS_ON_NODE="8").returncode == 0
    by_itself, together, _ = [line.split("\t") for line in lines("asked")]
    checks = f"{Path.cwd()}/run/stage1/attempts/7.0/preflight"
    nodes = ["--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--nodelist", "n1,n2", "--overlap"]
    for words in (by_itself, together):
        log, command = words.index("--output"), words.index("-c")
        assert words[: log - 2] == nodes
        assert words[log + 2 : command] == ["--gpus-per-node", "8", "--container-image=a b", "bash"]
    own = ["--ranks", "8", "--gpus", "8", "--scratch", "/a scratch", "--run", f"{Path.cwd()}/run/stage1"]
    assert by_itself[-12:] == [checks, "node", *own, "--out", checks]
    assert together[-8:] == [checks, "network", "--nodes", "n1,n2", "--port", "12091", "--out", checks]


@pytest.mark.parametrize(("before", "excluded"), [("", "n2"), ("n[8-9]", "n[8-9],n2")])
def test_without_a_spare_the_job_goes_elsewhere(before: str, excluded: str) -> None:
    bad = of("n2", 'echo "its disk is full" >"$checks/n2.fault"')
    done = train(CHECK=f"{ANSWER}; {bad}", EXCLUDED=before, REQUEUE="kill -TERM $PPID")
    assert done.returncode == 1  # it ends by itself: Slurm would else end it before the node is excluded
    assert lines("told") == ["requeue 7", f"update JobId=7 ExcNodeList={excluded}"]
    assert not any("node.sh" in line for line in lines("asked"))
    assert lines("run/stage1/attempts/failures") == ["none"]


def test_a_node_that_says_nothing_is_asked_again_by_itself() -> None:
    """A step that cannot start on one node ends on all."""
    quiet = '[ "$on" != "n1 n2 n3" ] || exit 1'
    silent = of("n3", 'echo "srun: error: n3: cannot start" >&2; exit 1')
    done = train("--spares", "1", CHECK=f"{quiet}; {silent}; {ANSWER}", **THREE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert nodes_that_train() == ["n1", "n2"]
    assert "n3: did not finish its check: srun: error: n3: cannot start\n" in done.stdout
    checked = [line.split("\t") for line in lines("asked") if "node\t--ranks" in line]
    assert sorted(words[words.index("--nodelist") + 1] for words in checked) == ["n1", "n1,n2,n3", "n2", "n3"]


def test_what_srun_says_of_a_node_is_not_said_of_another() -> None:
    said = "srun: error: n1: cannot start\nsrun: error: n10: no such user\n"
    done = train("--spares", "1", NODES="n1 n10 n2", CHECK=f"{of('n1', f'printf {said!r}; exit 1')}; {ANSWER}")
    assert "n1: did not finish its check: srun: error: n1: cannot start\n" in done.stdout
    last = of("n1", 'echo "its own words" >"$checks/n1.log"; exit 1')
    done = train(
        "--spares", "1", "--run", "again", NODES="n1 n10 n2", CHECK=f"{last}; {ANSWER}", TRAIN="touch again/stage1/DONE"
    )
    assert "n1: did not finish its check: its own words\n" in done.stdout


@pytest.mark.parametrize(
    ("nodes", "code", "told"),
    [
        ("n1 n2", "1", []),  # no fault of one node
        ("n1", "1", ["requeue 7", "update JobId=7 ExcNodeList=n1"]),
        ("n1", "126", []),
        ("n1", "127", []),
    ],
)
def test_where_no_node_is_fit(nodes: str, code: str, told: list[str]) -> None:
    fault = f'for node in $on; do echo bad >"$checks/$node.fault"; echo {code} >"$checks/$node.code"; done'
    done = train(NODES=nodes, CHECK=f"{ANSWER}; {fault}")
    assert (done.returncode, lines("told")) == (1 if told else 2, told)
    assert ("error: no node is fit to train on" in done.stderr) == (not told)


def test_a_first_node_that_nobody_meets_is_left_out() -> None:
    """And what the others said of that meeting is forgotten."""
    network = """[ ! -e "$checks/open" ] || exit; touch "$checks/open"
    case $on in n1*) for node in $on; do echo "not met" >"$checks/$node.lost"; done ;;
    *) echo "late" >"$checks/n4.lost"; touch "$checks/network" ;; esac"""
    done = train("--spares", "2", NODES="n1 n2 n3 n4", NETWORK=network)
    assert done.returncode == 0, done.stdout + done.stderr
    assert nodes_that_train() == ["n2", "n3"]
    assert [line for line in done.stdout.splitlines() if line[:1] == "n"] == ["n1: not met", "n4: late"]
    met = [line.split("\t") for line in lines("asked") if "network\t--nodes" in line]
    assert [words[words.index("network") + 2] for words in met] == ["n1,n2,n3,n4", "n2,n3,n4"]


def test_nodes_that_do_not_work_together_are_not_avoided() -> None:
    network = 'echo "the all-reduce failed" >"$checks/together"; touch "$checks/network"'
    for _ in range(2):
        done = train(NETWORK=network)
        assert done.returncode == 1
        assert "the all-reduce failed" in done.stdout
    assert lines("told") == ["requeue 7"] * 2
    assert "giving up" in train(NETWORK=network).stdout
    assert len(lines("told")) == 2


@pytest.mark.parametrize("answer", [ANSWER, "exit 1"])
def test_time_is_up_during_the_check(answer: str) -> None:
    """What was found by then may be half of it."""
    done = train(CHECK=f"kill -USR1 $(ps -o ppid= $PPID); {answer}")
    assert (done.returncode, lines("told")) == (1, ["requeue 7"])
    assert "time is up: requeueing the job" in done.stdout
    assert not any("network\t--nodes" in line for line in lines("asked"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--spares", "2"), "--spares 2 of 2 nodes leaves none to train on"),
        (("--spares", "-1"), "--spares is -1; expected how many of the job's nodes are spare"),
        (("--spares", "08"), "--spares is 08; expected how many of the job's nodes are spare"),
        (("--spares",), "--spares needs a value"),
        (("--set", ""), "--set needs a value"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], error: str) -> None:
    done = train(*arguments)
    assert (done.returncode, done.stderr) == (2, f"error: {error}\n")
    assert not Path("asked").exists()


def test_no_checks() -> None:
    edit("HIVE_PREFLIGHT=0")
    assert train("--spares", "1").returncode == 0
    assert nodes_that_train() == ["n1"]
    assert len(lines("asked")) == 1
