"""Imported first by every script, before the slow imports: Ctrl-C and SIGTERM end it with one line
at any moment."""
import signal
import sys


def _print_one_line(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print(str(error) or "interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _terminate(number, frame):
    raise KeyboardInterrupt("terminated")       # so that temporary files are removed


sys.excepthook = _print_one_line
signal.signal(signal.SIGTERM, _terminate)
