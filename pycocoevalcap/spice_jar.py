"""SPICE (Anderson et al. 2016), by the jar of the package pycocoevalcap and Stanford CoreNLP 3.6.0.

The main program of the jar writes its scores with Java's JavaScript engine, which Java 15 removed.
Its classes are therefore called from Python, in a separate process: `python spice_jar.py REQUEST`
reads a JSON file and writes scores."""
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

CORENLP = "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"
# 400 MB
ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
UNPACKED = Path(ARCHIVE).stem
LIMIT_SECONDS = 300, 1.0        # time limit: a constant, plus a time per caption
OPENED = "lang math util text net io util.concurrent"   # Java packages that the jar accesses
CHUNK = 500                     # captions per call


def find_corenlp(folder):
    """Paths of CoreNLP's two jars in `folder` or in the folder of its unpacked archive; None if
    they are missing."""
    for directory in (Path(folder), Path(folder, UNPACKED)):
        if all((directory / name).is_file() for name in CORENLP):
            return [directory / name for name in CORENLP]
    return None


def fetch_corenlp(folder):
    """Downloads CoreNLP's two jars into `folder`."""
    import http.client
    import shutil
    import urllib.request

    from tqdm import tqdm

    from captioning.errors import InputError
    from captioning.files import atomic_path, make_folder
    try:
        with (urllib.request.urlopen(ARCHIVE, timeout=20) as response,
              tqdm.wrapattr(response, "read", total=response.length, desc="CoreNLP") as body,
              tempfile.TemporaryFile(dir=make_folder(folder)) as archive):
            shutil.copyfileobj(body, archive, 1 << 20)
            with zipfile.ZipFile(archive) as content:
                for name in CORENLP:
                    with (content.open(f"{UNPACKED}/{name}") as source,
                          atomic_path(Path(folder, name)) as temporary,
                          open(temporary, "wb") as target):
                        shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"SPICE requires {' and '.join(CORENLP)}, which are not in {folder} and "
                         f"could not be downloaded ({error}): unpack {ARCHIVE} and give its folder "
                         "with --corenlp") from error


def spice(captions, references, corenlp):
    """SPICE of each of the tokenised captions, from lists of tokenised references.

    corenlp: folder of Stanford CoreNLP 3.6.0, downloaded if missing. Parsed captions are cached
    there."""
    from captioning.errors import InputError
    from pycocoevalcap import java
    if not find_corenlp(corenlp):
        fetch_corenlp(corenlp)
    jars = [*find_corenlp(corenlp), java.package_file("spice", "spice-1.0.jar"),
            *java.package_file("spice", "lib").glob("*.jar")]
    cache = Path(corenlp, "spice_cache")
    cache.mkdir(exist_ok=True)
    runtime = java.runtime()
    count = len(captions) + sum(map(len, references))
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "request.json")
        result = Path(folder, "scores.json")
        request.write_text(json.dumps({
            "captions": captions, "references": references, "result": str(result),
            "home": runtime.home, "options": java_options(runtime.version),
            "jars": list(map(str, jars)), "cache": str(cache)}))
        # its standard error, a progress bar, is shown
        messages, _ = java.communicate([sys.executable, "-X", "utf8", __file__, str(request)], "",
                                       LIMIT_SECONDS[0] + LIMIT_SECONDS[1] * count, stderr=None)
        if not result.exists():
            raise InputError(f"SPICE failed{java.last_line(messages)}: it requires pip install "
                             "JPype1, 8 GB of memory and undamaged jars of CoreNLP 3.6.0")
        return json.loads(result.read_text())


def java_options(version):
    """JVM options for the jar of 2016: access to internals, restricted since Java 9, with warnings
    since 17 and 23."""
    options = ["-Xmx8G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
    if version >= 9:
        options += [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in OPENED.split()]
    if version >= 17:
        options.append("--enable-native-access=ALL-UNNAMED")
    if version >= 23:
        options.append("--sun-misc-unsafe-memory-access=allow")
    return options


def score(request):
    """SPICE of each caption in the request: F1 of its tuples and those of all its references, with
    synonyms. Starts the Java virtual machine in this process."""
    import jpype
    from tqdm import tqdm
    os.environ["JAVA_HOME"] = request["home"]       # whose library JPype loads
    jpype.startJVM(*request["options"], classpath=request["jars"], convertStrings=True)
    system = jpype.JClass("java.lang.System")
    system.setErr(system.out)       # CoreNLP prints its progress to standard error
    evaluation = jpype.JClass("edu.anu.spice.Evaluation")
    tuple_set = jpype.JClass("edu.anu.spice.TupleSet")
    array_list = jpype.JClass("java.util.ArrayList")
    boxed = jpype.JClass("java.lang.Integer").valueOf
    parser = jpype.JClass("edu.anu.spice.SpiceParser")(request["cache"], os.cpu_count(), True)
    captions = request["captions"]
    scores = []
    for start in tqdm(range(0, len(captions), CHUNK), desc="SPICE", unit=f"{CHUNK} captions"):
        references = request["references"][start:start + CHUNK]
        counts = array_list([boxed(len(texts)) for texts in references])
        texts = array_list([text for texts in references for text in texts])
        true = parser.parseCaptions(texts, counts)
        predicted = parser.parseCaptions(array_list(captions[start:start + CHUNK]))
        for a, b in zip(predicted, true, strict=True):
            scores.append(float(evaluation(tuple_set(a), tuple_set(b), False, True).f))
    return scores


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        Path(job["result"]).write_text(json.dumps(score(job)))
    except BaseException as failure:
        print("\n" + f"{type(failure).__name__}: {failure}".splitlines()[0], flush=True)
        os._exit(1)             # threads of the parser may never end
    os._exit(0)
