"""How every script ends: exit status 0 on success, 2 with one sentence for invalid input."""
import errno
import re
import sys


class InputError(Exception):
    """Invalid input from the user. The message is one sentence that states what is wrong and how
    to correct it."""

    def __init__(self, message):
        # an error raised in a DataLoader's worker arrives with the worker's traceback before it
        super().__init__(one_line(str(message).rsplit("InputError: ", 1)[-1]))


def one_line(message):
    """`message` in one line, in which values of several hundred characters are shortened."""
    message = " ".join(message.split())
    return re.sub(r"\S{300,}", lambda value: value[0][:100] + "…", message)


def close_progress_bars():
    """Closes open progress bars, which would write after the sentence of an error."""
    module = sys.modules.get("tqdm")
    for bar in list(getattr(module and module.tqdm, "_instances", ())):
        bar.close()


def run_script(main, args):
    """Calls main(args); InputError ends the process with its sentence and exit status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")       # file names need not be valid Unicode
    try:
        main(args)
    except InputError as error:
        close_progress_bars()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # most checks for a missing file raise this
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {one_line(str(error.filename))} cannot be the path of a file (it is too "
              "long): use a shorter name", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        # a line of its own: a progress bar may have left the cursor within its line
        close_progress_bars()
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
