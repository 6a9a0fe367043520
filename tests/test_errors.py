"""How scripts end: one sentence and exit status 2 for what the operating system refuses, too."""
import subprocess
import sys
from pathlib import Path

import pytest

from captioning.errors import one_line

ROOT = Path(__file__).parents[1]
SCRIPT = """if True:
    import os
    import sys
    from captioning.errors import InputError, run_script
    def main(args):
        if args == "lines":
            for number in range(100_000):
                print(number)
        if args == "open":
            open("missing.txt")
        if args == "pipe":
            os.close(0)
            reader, writer = os.pipe()
            os.close(reader)
            os.write(writer, b"x")
        if args == "files":
            files = [open(os.devnull) for _ in range(100)]
        if args == "gloo":
            raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")
        if args == "worker":
            raise OSError("Caught OSError in DataLoader worker\\nTraceback\\nOSError: [Errno 5]")
        if args == "error":
            raise InputError("bad \\x1b[31mvalue")
        print("done")
    run_script(main, sys.argv[1])
"""


@pytest.mark.parametrize(("command", "status", "message"), [
    ("lines | head -1", 141, ""), ("lines >/dev/full", 2, "the output cannot"),
    ("done >/dev/full", 2, "the output cannot be read or written (No space left"),
    ("done >&-", 0, ""),
    ("open", 2, "missing.txt cannot be read or written (No such file"),
    ("pipe", 2, "a file or connection cannot be read or written (Broken pipe)"),
    ("worker", 2, "a file or connection cannot be read or written (OSError: [Errno 5])"),
    ("files", 2, "(Too many open files): lower --workers, or raise the limit (ulimit -a)"),
    ("gloo", 2, "another process of torchrun has ended or was killed: see its message"),
    ("error", 2, "bad \\x1b[31mvalue")])
def test_how_scripts_end(command, status, message):
    command = f'set -o pipefail; ulimit -n 64; "{sys.executable}" -c "$SCRIPT" {command}'
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env={"SCRIPT": SCRIPT}, text=True,
                            capture_output=True, timeout=300)
    assert result.returncode == status
    lines = result.stderr.splitlines()
    assert message in result.stderr and len(lines) == bool(message)


def test_messages_are_short():
    assert len(one_line("a " * 1_000_000)) < 2000
