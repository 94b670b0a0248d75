"""Names of a model's files, and safetensors files that can be mapped into memory without changing results.

tensors -> `write_safetensors` -> a file with aligned tensors, and its sha256.
"""

import hashlib
import json
import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import torch

WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'
CARD_NAME = 'README.md'
SUMMARY_NAME, CURVES_NAME = 'summary.csv', 'curves.png'  # how a run went, epoch by epoch
# timm looks for a folder's weights under these names, in this order
WEIGHTS_NAMES = (WEIGHTS_NAME, 'pytorch_model.bin', 'pytorch_model.pth', 'model.pth')
WEIGHTS_SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.bin', '.npz', '.pt', '.ckpt')
ALIGNMENT = 64  # bytes
# the head of a card, its group 1, as huggingface_hub finds it: empty lines may come before it
CARD_HEAD = re.compile(r'\ufeff?\s*---\r?\n(.*?)(?<=\n)---[ \t]*(?:\r?\n|$)', re.DOTALL)
_DTYPES = {
    **{torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.float64: 'F64'},
    **{torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8'},
    torch.bool: 'BOOL',
}


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Optional[Mapping[str, str]] = None
) -> str:
    """Write a safetensors file whose tensors begin at multiples of 64 bytes, as torch's own do in memory.

    A matrix product may round differently if its operands are not aligned so; thanks to this, a model whose weights
    are mapped from the file computes, bit for bit, what the saved model computed. The format does not allow gaps, so
    tensors whose size is no multiple of 64 bytes come last; whoever maps the file copies those.

    Args:
        metadata: What the file's header tells beside the format.

    Returns:
        The sha256 of what was written.

    Raises:
        ValueError: for a tensor that safetensors can not hold.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, name))
    header: Dict[str, Any] = {'__metadata__': {'format': 'pt', **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f'{name}: has dtype {tensor.dtype}, expected one of {", ".join(map(str, _DTYPES))}.')
        start, end = end, end + tensor.nbytes
        header[name] = {'dtype': _DTYPES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open('wb') as file:

        def write(part: Any) -> None:
            file.write(part)
            digest.update(part)

        write(struct.pack('<Q', len(text)) + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            write(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def is_whole(path: Path) -> bool:
    """Return whether a file has its end, of a format that tells: safetensors, and zip, which torch and npz are."""
    size = path.stat().st_size
    with path.open('rb') as file:
        start = file.read(9)
        if start.startswith(b'PK'):
            return zipfile.is_zipfile(path)
        length = int.from_bytes(start[:8], 'little')
        if start[8:] != b'{' or length > 100_000_000:  # the format's own limit
            return True
        if 8 + length > size:
            return False
        file.seek(8)
        with suppress(ValueError, LookupError, TypeError, AttributeError):  # whoever reads it says what is wrong
            entries = json.loads(file.read(length))
            ends = [entry['data_offsets'][1] for name, entry in entries.items() if name != '__metadata__']
            return 8 + length + max(ends, default=0) <= size
    return True
