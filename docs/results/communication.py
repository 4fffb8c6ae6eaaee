"""Count what real runs send on CPU ranks, beside the prediction: `communication.py [RANKS ...]`, default 1 2 4 8.

Writes communication.json beside itself; numbers of ranks that are not counted again stay as they were.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "training"), str(TESTS / "data")]

import conftest  # noqa: E402, F401 (settings of every test)
from communication_cases import CASES, predicted  # noqa: E402
from ranks import launch_checks, passed  # noqa: E402

from hive_ds.versions import made_with  # noqa: E402


def main() -> None:
    """Run the cases on each number of ranks, and write after each."""
    out = HERE / "communication.json"
    stored = json.loads(out.read_text())["cases"] if out.exists() else {}
    for ranks in map(int, sys.argv[1:] or ("1", "2", "4", "8")):
        check = f"communication_checks.check_{'communication' if ranks < 8 else 'scaling'}"
        with tempfile.TemporaryDirectory() as folder:
            counted = passed(launch_checks([check], ranks, Path(folder))[check])
            for case in CASES:
                if case.name in counted:
                    expected = predicted(case, Path(folder) / "tiny", ranks)
                    stored.setdefault(case.name, {})[str(ranks)] = {
                        "measured": counted[case.name],
                        "predicted": expected,
                    }
        out.write_text(json.dumps({**made_with(), "step": 3, "cases": stored}, indent=1) + "\n")
        print(f"{ranks} ranks: {len(counted)} cases")


if __name__ == "__main__":  # ranks import this file
    main()
