"""Our safetensors files are read by the library, and laid out so that they can be mapped into memory."""

import hashlib
import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from timm_vitres.weights import files


def test_safetensors_files_are_the_librarys(tmp_path):
    """What we write, its library reads: every dtype, shapes of no and of one dimension, strides."""
    tensors = {
        'b': torch.randn(3, 5).T,
        'a': torch.arange(7),
        'scalar': torch.tensor(3.5, dtype=torch.float64),
        'empty': torch.empty(0, 4),
        'half': torch.randn(64).half(),
        'brain': torch.randn(2, 3, 5).bfloat16().to(memory_format=torch.contiguous_format),
        'flags': torch.tensor([True, False]),
        'channels_last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    files.write_safetensors(tensors, tmp_path / 'file.safetensors')
    read = safetensors.torch.load_file(tmp_path / 'file.safetensors')
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in tensors.items())
    with pytest.raises(ValueError, match='z: has dtype'):
        files.write_safetensors({'z': torch.zeros(1, dtype=torch.complex64)}, tmp_path / 'file.safetensors')


def test_tensors_begin_where_torchs_own_do(tmp_path):
    """They begin at multiples of 64 bytes, without gaps; tensors of an uneven size come last, ordered by name."""
    tensors = {name: torch.randn(size) for name, size in (('e', 3), ('d', 16), ('c', 5), ('b', 32), ('a', 1), ('f', 0))}
    path = tmp_path / 'a.safetensors'
    digest = files.write_safetensors(tensors, path)
    data = path.read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop('__metadata__') == {'format': 'pt'} and (8 + length) % 64 == 0
    assert list(header) == ['b', 'd', 'f', 'a', 'c', 'e']
    end = 0
    for name, entry in header.items():
        start, stop = entry['data_offsets']
        assert start == end and stop - start == 4 * len(tensors[name])
        assert start % 64 == 0 or name in ('c', 'e')  # they follow the first tensor of an uneven size
        assert data[8 + length + start : 8 + length + stop] == tensors[name].numpy().tobytes()
        end = stop
    assert len(data) == 8 + length + end
    assert digest == hashlib.sha256(data).hexdigest()


def test_a_header_tells_more_where_it_shall(tmp_path):
    path = tmp_path / 'a.safetensors'
    files.write_safetensors({'a': torch.arange(7)}, path, {'name': 'x'})
    with safetensors.safe_open(path, 'pt') as file:
        assert file.metadata() == {'format': 'pt', 'name': 'x'} and torch.equal(file.get_tensor('a'), torch.arange(7))


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Their order and their strides make no difference, nor does it make one whether they are parameters."""
    tensors = {'b': torch.randn(4, 3), 'a': torch.randn(2, 3, 4, 5)}
    other = {'a': tensors['a'].to(memory_format=torch.channels_last), 'b': torch.nn.Parameter(tensors['b'].T.clone().T)}
    digests = [files.write_safetensors(each, tmp_path / 'a.safetensors') for each in (tensors, other)]
    assert digests[0] == digests[1]
    other['b'].data[0, 0] += 1
    assert files.write_safetensors(other, tmp_path / 'a.safetensors') != digests[0]


def test_a_dtype_that_no_file_can_hold_leaves_the_file(tmp_path):
    (tmp_path / 'a.safetensors').write_text('old')
    tensors = {'a': torch.ones(1), 'b': torch.ones(1, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r'^b: has dtype torch\.complex64, expected one of torch\.float32, '):
        files.write_safetensors(tensors, tmp_path / 'a.safetensors')
    assert (tmp_path / 'a.safetensors').read_text() == 'old'
