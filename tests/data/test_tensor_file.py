"""The reader of safetensors files gives what the library wrote, and refuses a file that is not whole."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from openvision3.data.tensor_file import TensorFile

TENSORS = {"bytes": np.arange(7, dtype=np.uint8), "keys": np.arange(-3, 3, dtype=np.int64).reshape(2, 3), "none": np.zeros((0, 4), np.int32)}


def test_tensors_and_metadata_are_those_that_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata={"format": "2"})
    file = TensorFile(tmp_path / "file")
    assert file.metadata == {"format": "2"} and file.places.keys() == TENSORS.keys()
    for name, array in file.map().items():
        assert array.dtype == TENSORS[name].dtype and np.array_equal(array, TENSORS[name])


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_file_that_is_cut_anywhere_is_refused_with_its_name(tmp_path, length):
    save_file(TENSORS, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(data[:length])
    with pytest.raises(ValueError, match=r"file is not a whole safetensors file"):
        TensorFile(tmp_path / "file")
    (tmp_path / "file").write_bytes(data + b"x")
    with pytest.raises(ValueError, match="not as long as its header says"):
        TensorFile(tmp_path / "file")
