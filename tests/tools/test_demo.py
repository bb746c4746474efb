"""The demo's steps, each a script of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(1)  # longer than subprocess.run leaves a child
    Path(sys.argv[1], "saved").touch()
    sys.exit(130)

signal.signal(signal.SIGINT, save)
Path(sys.argv[1], "started").touch()
time.sleep(60)
"""


def test_ctrl_c_leaves_a_step_the_time_to_save(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    call = f"from tools.demo import run; run({str(tmp_path / 'slow.py')!r}, {str(tmp_path)!r})"
    demo = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and demo.poll() is None
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(timeout=30) == 130
    assert (tmp_path / "saved").exists()
