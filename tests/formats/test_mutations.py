"""20,000 damaged files (ANYMASK_DAMAGED_FILES for more): a mask or an error of ours comes out, no warning, no hang, and no more memory than
the file explains."""

import io
import os
import random
import resource
import time
import warnings
import zipfile
from collections import Counter

import pytest

from anymask.errors import AnymaskError
from anymask.formats import load_mask
from anymask.mask import Mask
from tests.formats.seeds import SEEDS, net, seed_bytes

SHARDS, FILES = int(os.environ.get("ANYMASK_DAMAGED_FILES", "20000")) // 2_500, 2_500
MEGABYTES, SECONDS = 100, 10  # what one shard may add to the memory of its process, and what one file may take
NUMBERS = [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0\0\0\0\x01\0\0\0", b"\x7f", b"\x80"]


def mutated(blob: bytes, lot: random.Random) -> bytes:
    """`blob` with one to three places damaged."""
    data = bytearray(blob)
    for _ in range(lot.choice((1, 1, 2, 3))):
        at, size = lot.randrange(len(data) + 1), lot.choice((1, 2, 4, 8, 64))
        match lot.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << lot.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = lot.randbytes(size)
            case 3:
                del data[at : at + size]
            case 4:
                number = lot.choice(NUMBERS)
                data[at : at + len(number)] = number
            case 5:  # two chunks change places
                other = lot.randrange(len(data) + 1)
                data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
            case _:  # one is doubled
                data[at:at] = data[at : at + size]
    return bytes(data)


def inside_out(blob: bytes, lot: random.Random) -> bytes:
    """A zip archive with one of its files damaged and the checksums right, so that the damage gets past the archive."""
    source = zipfile.ZipFile(io.BytesIO(blob))
    victim, out = lot.choice(source.namelist()), io.BytesIO()
    with zipfile.ZipFile(out, "w", lot.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for entry in source.infolist():
            content = source.read(entry)
            archive.writestr(entry.filename, mutated(content, lot) if entry.filename == victim else content)
    return out.getvalue()


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_damaged_file_gives_a_mask_or_an_error_of_ours(tmp_path, shard):
    lot, model, outcomes = random.Random(shard), net(), Counter()
    blobs = {name: seed_bytes(name) for name in SEEDS}
    for name in SEEDS:  # the shards of a checkpoint lie beside their index
        SEEDS[name][0](tmp_path / "whole")
        load_mask(tmp_path / "whole")
    memory, path, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, tmp_path / "file", 0.0
    for number in range(FILES):
        blob = blobs[lot.choice(list(blobs))]
        change = inside_out if blob.startswith(b"PK") and lot.random() < 0.5 else mutated
        path.unlink(missing_ok=True)  # to write over a file takes ext4 3 ms, more than all else here
        path.write_bytes(change(blob, lot))
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                outcome = type(load_mask(path, model=model if number % 4 == 0 else None))
            except (AnymaskError, OSError) as error:
                outcome = type(error)
        assert caught == []
        slowest = max(slowest, time.perf_counter() - began)
        outcomes[outcome] += 1
    assert slowest < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MEGABYTES
    assert outcomes[Mask] > FILES // 100  # some damage is harmless, or what is mutated is no file at all
    assert sum(outcomes.values()) - outcomes[Mask] > FILES // 2
