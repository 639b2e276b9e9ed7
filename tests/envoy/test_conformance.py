"""Our picker before the conformance suite that others may use too."""
import pathlib
import subprocess
import sys

from harness import Picker, minimal


def test_the_minimal_picker_speaks_the_protocol():
    endpoints = ["127.0.0.1:8001", "[::1]:8002"]
    for tls in (True, False):
        picker = Picker(minimal(endpoints), tls)
        try:
            suite = subprocess.run(
                [sys.executable, pathlib.Path(__file__).parent / "conformance.py", f"127.0.0.1:{picker.port}",
                 f"--health=127.0.0.1:{picker.health_port}", f"--endpoints={','.join(endpoints)}", "--ignores-bodies",
                 *([] if tls else ["--plain"])], capture_output=True, text=True)
            assert suite.returncode == 0 and "FAILED" not in suite.stdout, suite.stdout + suite.stderr
        finally:
            picker.stop()
