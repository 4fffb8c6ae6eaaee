"""``PYTHONPATH=docs python -m hive_docs``: write every page and picture that is made from the code."""

from __future__ import annotations

from hive_docs.pages import DOCS, pages
from hive_ds.files import write_whole


def main() -> None:
    """Write what differs, and say what that was."""
    for name, text in pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
