"What a benchmark was run with."

import json
import platform
from importlib import metadata
from pathlib import Path

import torch


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_about(path, *packages, **more):
    "A JSON file beside a table: command, threads, versions, processor."
    about = dict(command="make bench", threads=torch.get_num_threads(), **more)
    about |= {name: metadata.version(name) for name in ("torch", *packages)}
    about |= dict(python=platform.python_version(), processor=cpu_name(), system=platform.system())
    path.write_text(json.dumps(about, indent=1) + "\n")
