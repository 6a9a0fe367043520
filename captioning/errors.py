"""How every script ends: exit status 0 on success, 2 with one sentence for invalid input."""
import errno
import os
import re
import sys


class InputError(Exception):
    """Invalid input from the user. The message is one sentence that states what is wrong and how
    to correct it."""

    def __init__(self, message):
        # an error raised in a DataLoader's worker arrives with the worker's traceback before it
        super().__init__(one_line(str(message).rsplit("InputError: ", 1)[-1]))


def one_line(message):
    """`message` in one line, in which values of several hundred characters are shortened, and of
    a long message the middle; escape sequences do not reach the terminal."""
    message = " ".join(message[:100_000].split())
    message = re.sub(r"\S{300,}", lambda value: value[0][:100] + "…", message)
    message = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in message)
    return message if len(message) <= 2000 else f"{message[:1000]} … {message[-900:]}"


def close_progress_bars():
    """Closes open progress bars, which would write after the sentence of an error."""
    module = sys.modules.get("tqdm")
    for bar in list(getattr(module and module.tqdm, "_instances", ())):
        bar.close()


def run_script(main, args):
    """Calls main(args); InputError ends the process with its sentence and exit status 2, and so
    does whatever the operating system refuses."""
    if sys.stdout is None:      # closed by the caller
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")       # file names need not be valid Unicode
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:     # the reader of the output has ended, such as `head`
        close_progress_bars()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)       # as programs do that SIGPIPE ends
    except InputError as error:
        close_progress_bars()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        close_progress_bars()
        if error.filename is None and error.errno == errno.ENOSPC:
            # else Python would try to write what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = "a file" if error.filename is None else one_line(str(error.filename))
        print(f"error: {what} cannot be read or written ({error.strerror or error}): check the "
              "path, its permissions and the free space", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        # a line of its own: a progress bar may have left the cursor within its line
        close_progress_bars()
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
