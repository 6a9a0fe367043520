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


def system_sentence(error):
    """What an error of the operating system, or of PyTorch about other processes, means and what
    helps; None for other errors."""
    text = str(error)
    if isinstance(error, OSError):
        # that of a DataLoader's worker contains its traceback, which ends with the reason
        reason = one_line(error.strerror or text.split("\n")[-1])
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
            return (f"the system's limit of files, processes or memory is reached ({reason}): "
                    "lower --workers, or raise the limit (ulimit -a)")
        if error.filename is not None:
            what = one_line(str(error.filename))
        else:
            what = "the output" if output_fails() else "a file or connection"
        return (f"{what} cannot be read or written ({reason}): check the path, its permissions and "
                "the free space")
    if re.search("DataLoader worker .* (killed|exited)|Communication with the workers", text):
        return ("a worker process has ended or cannot be reached, perhaps for lack of memory or "
                "open files: lower --workers, or raise the limit (ulimit -a)")
    distributed = sys.modules.get("torch.distributed")
    if "gloo/transport" in text or distributed and isinstance(error, distributed.DistError):
        return ("another process of torchrun has ended or was killed: see its message, and run "
                "the same command again")
    return None


def output_fails():
    """Whether the standard output cannot be written; if so, what is left of it is discarded, which
    Python would try to write at the end."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run_script(main, args):
    """Calls main(args); InputError ends the process with its sentence and exit status 2, and so
    does whatever the operating system refuses."""
    if sys.stdout is None:      # closed by the caller
        sys.stdout = open(os.devnull, "w")      # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")       # file names need not be valid Unicode
    try:
        main(args)
        sys.stdout.flush()
    except (InputError, OSError, RuntimeError) as error:
        close_progress_bars()
        if isinstance(error, BrokenPipeError) and output_fails():
            sys.exit(141)       # as programs do that SIGPIPE ends: the output's reader has ended
        sentence = error if isinstance(error, InputError) else system_sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        # a line of its own: a progress bar may have left the cursor within its line
        close_progress_bars()
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
