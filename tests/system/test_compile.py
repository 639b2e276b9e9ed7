"""Every program of the ladder compiles for a TPU v6e that is not here. Fetches libtpu."""
import subprocess

import pytest
from stack import BATON


@pytest.mark.slow
def test_every_program_compiles_for_v6e():
    done = subprocess.run([BATON, "compile", "smollm2", "--topology", "v6e:2x4"], capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    title, _, *rows = done.stdout.splitlines()
    assert title == "v6e:2x4: 8 x TPU v6 lite"
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert {name.split("-")[0] for name in table} == {"decode", "prefill", "export", "import"} and len(table) >= 6
    for name, (_, arguments_mb, _, code_mb, gflop) in table.items():
        assert float(arguments_mb) > 100 and float(code_mb) > 0
        assert name.startswith(("export", "import")) or float(gflop) > 0.1
