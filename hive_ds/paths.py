"""Where the files that come with the package lie, in a checkout and in an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

from hive_ds.errors import HiveError

PACKAGE = Path(__file__).resolve().parent
RECIPES = PACKAGE / "recipes"


def ds_configs_folder() -> Path:
    """The folder of ZeRO policies: inside the package when installed, at the repository's root in a checkout."""
    installed = PACKAGE / "ds_configs"
    return installed if installed.is_dir() else PACKAGE.parent / "ds_configs"


def ds_config_path(name_or_path: str) -> Path:
    """The JSON file of a ZeRO policy, by the name of one that comes with the package (``zero3``) or by its own path."""
    return find_file(name_or_path, ds_configs_folder(), ".json", "ds_config")


def find_file(name_or_path: str, folder: Path, suffix: str, thing: str, relative_to: Path | None = None) -> Path:
    """A file that comes with the package, by its bare name, or any file by its path.

    What holds a slash or ends in ``suffix`` is a path; a path that is not absolute starts at ``relative_to`` (default:
    the working directory). Raises HiveError that names the nearest file where there is none.
    """
    if name_or_path.endswith(suffix) or "/" in name_or_path:
        path = (relative_to or Path()) / Path(name_or_path).expanduser()
        if not path.is_file():
            raise HiveError(f"{thing} {name_or_path}: no such file (looked for {path}); expected a {suffix} file")
        return path
    names = sorted(path.stem for path in folder.glob(f"*{suffix}"))
    if name_or_path not in names:
        close = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise HiveError(
            f"{thing} {name_or_path}: expected one of {', '.join(names)}, or a path ending in {suffix}{hint}"
        )
    return folder / f"{name_or_path}{suffix}"
