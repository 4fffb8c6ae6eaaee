"""What a host says about itself: ``ssh HOST python - PORT FOLDER MASTER < probe.py`` prints one JSON object.

It runs where hive-ds may be missing, so it needs nothing but Python.
"""

import glob
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time

PACKAGES = ("hive-ds", "torch", "deepspeed", "transformers", "mosaicml-streaming")

SHM_PER_RANK = 0.25e9
"""Bytes: data loader workers hand over batches through /dev/shm; a container has 64 MB of it unless told otherwise."""


def version(package):
    """Version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def port_is_free(port):
    """Whether this host can listen on a port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def resolves(host):
    """Whether this host knows another's address."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def free(folder):
    """Free bytes of the disk that a folder lies on, or None where the folder is missing or read-only."""
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else None


def versions():
    """Version of Python and of each package, None where it is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def main(port, folder, master):
    """Print the report."""
    report = {
        "versions": versions(),
        "gpus": len(glob.glob("/dev/nvidia[0-9]*")),
        "cores": len(os.sched_getaffinity(0)),
        "port_free": port_is_free(port),
        "shm_free": free("/dev/shm"),
        "disk_free": free(folder),
        "master_known": resolves(master),
        "time": time.time(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
