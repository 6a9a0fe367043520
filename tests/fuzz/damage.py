"""Damages files: at random bytes, or in their values, which stay readable but become unusual."""
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import torch
from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 7, 2**31, -2**63, 10**20, 10**400, 0.5, -0.0, 1e308, float("nan"),
           float("inf"), True]
TEXTS = ["", ".", "..", "./", "/", "a/../../b", "a\n", "\0", "\ud800", "$\\frac{$", "<script>",
         "é" * 300, "<end>", "1" * 5000, "train", "dog", "index.html"]
VALUES = st.sampled_from([None, [], {}, [[]], {"a": 1}, *NUMBERS, *TEXTS])
ARRAYS = [np.zeros(0), np.zeros((0, 3, 5)), np.float32(3), np.full((2, 3, 5), np.nan, np.float32),
          np.array(["a", "b"]), np.array([b"x"]), np.full((2, 2, 10), -1),
          np.full((2, 2, 10), 2**31), np.zeros((8, 2, 10), np.int32), np.array([5, -1]),
          np.zeros((2, 3, 4), np.float32), np.ones((2, 3, 5)) * 1e30, np.ones((2, 3), bool)]


def tamper(draw, path):
    """Damages the file at `path`; draw: of hypothesis."""
    kinds = {".json": in_json, ".hdf5": in_hdf5, ".npz": in_npz, ".pth": in_checkpoint}
    choices = [in_bytes, in_bytes, replaced]
    if path.suffix in kinds:
        choices += [kinds[path.suffix]] * 6
    draw(st.sampled_from(choices))(draw, path)


def in_bytes(draw, path):
    """Cuts, inverts, overwrites or inserts bytes."""
    content = bytearray(path.read_bytes())
    position = draw(st.integers(0, max(0, len(content) - 1)))
    kind = draw(st.sampled_from(["cut", "invert", "zero", "insert", "empty", "double"]))
    if kind == "cut":
        del content[position:]
    elif kind == "invert" and content:
        content[position] ^= 1 << draw(st.integers(0, 7))
    elif kind == "zero":
        content[position:position + 64] = bytes(min(64, len(content) - position))
    elif kind == "insert":
        content[position:position] = draw(st.binary(min_size=1, max_size=20))
    elif kind == "empty":
        content.clear()
    else:
        content *= 2
    path.write_bytes(content)


def replaced(draw, path):
    """Replaces the file by something else."""
    other = draw(st.sampled_from(["nothing", "folder", "pipe", "link to itself", "pickle", "array",
                                  "image", "text"]))
    path.unlink()
    if other == "folder":
        path.mkdir()
    elif other == "pipe":
        os.mkfifo(path)
    elif other == "link to itself":
        path.symlink_to(path.name)
    elif other == "pickle":
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.")
    elif other == "array":
        with open(path, "wb") as file:
            np.save(file, np.ones((2, 3)))
    elif other == "image":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    elif other == "text":
        path.write_text(draw(st.sampled_from(TEXTS)), errors="replace")


def changed(draw, value):
    """`value`, nested lists and dicts, in which one part is replaced, removed or repeated."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 7)):
        keys = sorted(value, key=str) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        kind = draw(st.integers(0, 9))
        result = value.copy()
        if kind == 0:
            del result[key]
        elif kind == 1 and isinstance(value, list):
            result.append(value[key])
        elif kind == 2 and isinstance(value, dict):
            result[draw(st.sampled_from(TEXTS))] = result.pop(key)
        else:
            result[key] = changed(draw, value[key])
        return result
    if isinstance(value, torch.Tensor) and draw(st.booleans()):
        return draw(st.sampled_from([
            value * torch.nan, value.flatten()[:-1], value[None], value.to_sparse(), -value - 1,
            value.int(), value.new_zeros(1).expand(10**6, 10**6), value.to("meta")]))
    return draw(VALUES)


def in_json(draw, path):
    """Changes one value of a JSON file."""
    text = json.dumps(changed(draw, json.loads(path.read_text())))
    path.write_text(text)


def in_checkpoint(draw, path):
    """Changes one value of a checkpoint."""
    torch.save(changed(draw, torch.load(path, weights_only=True)), path)


def in_npz(draw, path):
    """Changes one array of an .npz file."""
    with np.load(path) as file:
        arrays = dict(file)
    name = draw(st.sampled_from(sorted(arrays)))
    if draw(st.integers(0, 3)) == 0:
        del arrays[name]
    else:
        arrays[name] = changed_array(draw, arrays[name])
    np.savez(path, **arrays)


def changed_array(draw, array):
    """Another array, or one with an unusual value."""
    if array.dtype.kind not in "iuf" or not array.size or draw(st.booleans()):
        return draw(st.sampled_from(ARRAYS))
    array = array.copy()
    fractions = [np.nan, np.inf, 1e30] if array.dtype.kind == "f" else []
    value = draw(st.sampled_from([0, -1, 1, 10**4, 2**30, *fractions]))
    with np.errstate(all="ignore"):
        array.flat[draw(st.integers(0, array.size - 1))] = np.asarray(value).astype(array.dtype)
    return array


def in_hdf5(draw, path):
    """Changes one dataset or attribute of an HDF5 file."""
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        name = draw(st.sampled_from(sorted(file)))
        kind = draw(st.integers(0, 5))
        if kind == 0 and file.attrs:
            attribute = draw(st.sampled_from(sorted(file.attrs)))
            del file.attrs[attribute]
            if draw(st.booleans()):
                file.attrs[attribute] = draw(st.sampled_from([-1, 0, 2**40, "x", np.nan]))
        elif kind == 1:
            del file[name]
        elif kind == 2:
            shape = file[name].shape
            del file[name]
            file.create_dataset(name, (10**6, *shape[1:], 10**4)[:len(shape)], np.int32,
                                chunks=True)
        elif file[name].dtype.kind == "O":
            values = file[name].asstr()[:].tolist()
            values[0] = draw(st.sampled_from(["", ".", "..", "/", "a\n", "[]", "[1]", "{}",
                                              values[-1], "[[]]"]))
            file[name][...] = values
        else:
            array = changed_array(draw, file[name][()])
            del file[name]
            file[name] = array if array.dtype.kind != "U" else array.astype("S")
    Path(copy).replace(path)
