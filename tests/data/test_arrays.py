"""HDF5 files: only what lies in the file itself is read."""
import h5py
import numpy as np
import pytest
from helpers import refused

from captioning.data.arrays import open_hdf5, read_whole


def external_storage(file, folder):
    (folder / "secret.bin").write_bytes(bytes(range(16)))
    file.create_dataset("x", (16,), "u1", external=[(str(folder / "secret.bin"), 0, 16)])


def link_to_another_file(file, folder):
    with h5py.File(folder / "other.hdf5", "w") as other:
        other["x"] = np.arange(16)
    file["x"] = h5py.ExternalLink("other.hdf5", "x")


def virtual_dataset(file, folder):
    link_to_another_file(file, folder)
    del file["x"]
    layout = h5py.VirtualLayout((16,), "i8")
    layout[:] = h5py.VirtualSource(str(folder / "other.hdf5"), "x", (16,))
    file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize("write", [external_storage, link_to_another_file, virtual_dataset])
def test_data_of_other_files_are_refused(tmp_path, write):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        write(file, tmp_path)
    message = "lies in another file"
    with (refused(message), open_hdf5(tmp_path / "x.hdf5") as file):
        read_whole(file, "x")


def test_data_that_are_only_announced_are_refused(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("x", (10 ** 8,), chunks=True)
    with refused("most values of its dataset 'x' are missing"), open_hdf5(tmp_path / "x.hdf5", "x"):
        pass


def test_data_of_the_file_are_read(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["x"] = np.arange(16)
    with open_hdf5(tmp_path / "x.hdf5", ["x"]) as file:
        assert np.array_equal(read_whole(file, "x"), np.arange(16))
