"""Tests leave no process behind, and all of them start theirs in the same way."""

import os
import re
import signal
from pathlib import Path

import pytest
from processes import forked, started_python

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
# One write, so that the line comes whole.
sys.stdout.write("started\\n")
sys.stdout.flush()
time.sleep(3600)
"""


def test_a_process_ends_with_its_block_and_takes_along_what_it_started():
    reader, writer = os.pipe()
    processes = []

    def fail():
        with started_python("-c", PARENT, output=writer) as process:
            os.close(writer)
            processes.append(process)
            assert os.read(reader, 1) == b"s"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert processes[0].returncode == -signal.SIGKILL
    # The pipe ends when the last that holds it is gone.
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"tarted\n"


def test_a_forked_process_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), forked(signal.pause) as process:
        raise ZeroDivisionError
    assert process.exitcode == -signal.SIGKILL


def test_no_other_module_starts_processes():
    here = Path(__file__).parent
    allowed = {"processes.py", Path(__file__).name}
    pattern = re.compile(r"subprocess\.(run|Popen|check_)|\.Process\(|os\.(fork|spawn)")
    for path in here.glob("*.py"):
        if path.name not in allowed:
            assert not pattern.search(path.read_text(encoding="utf-8")), path.name
