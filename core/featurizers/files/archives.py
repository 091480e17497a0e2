"""Check untrusted zip archives (.pt, .npz) against size limits before they are opened."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BufferedReader
from zipfile import ZIP_STORED, ZipFile

from featurizers.errors import FeaturizerError, WeightsError, one_line, shown
from featurizers.files.regular import looks_like

MAX_ENTRIES = 50_000
"""Largest number of files in an archive."""
MAX_DIRECTORY = 10 * 2**20
"""Largest size in bytes of the directory, which is read as a whole."""

HEADER, END, END_64, LOCATOR = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
END_SIZE, END_64_SIZES = 22, (56, 20)
AGAIN = "; download or save it again"


@contextmanager
def reading(where: str, name: str) -> Iterator[None]:
    """Turn any exception that reading a file raises into a `WeightsError`.

    Args:
        where: name of the file's folder in errors.
        name: name of the file in errors.

    Raises:
        WeightsError: the block raised an exception that is not a `FeaturizerError`.
    """
    try:
        yield
    except FeaturizerError:
        raise
    except Exception as error:  # zipfile, zlib, struct, pickletools and torch each raise their own
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise WeightsError(where, f"{name} cannot be read: {reason}{AGAIN}") from error


def archive(file: BufferedReader, where: str, name: str, methods: Collection[int]) -> ZipFile:
    """Return the archive in a file after checking that its directory is small and agrees with the file.

    Archives that two zip readers could read differently are refused: the only directory must be at the very end of the
    file, and the names in it must differ even if case is ignored.

    Args:
        file: open for reading.
        where: name of the file's folder in errors.
        name: name of the file in errors.
        methods: compression methods that entries may have.

    Raises:
        WeightsError: the file is not such an archive.
    """

    def refuse(problem: str, remedy: str = AGAIN) -> WeightsError:
        return WeightsError(where, f"{name} cannot be read: {problem}{remedy}")

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(512)
    if not head.startswith(HEADER):
        raise refuse(_likely_format(head))
    file.seek(max(0, size - END_SIZE - sum(END_64_SIZES)))
    tail = file.read()
    record, locator, end = tail[-98:-42], tail[-42:-22], tail[-22:]
    if len(end) < END_SIZE or not end.startswith(END) or end[-2:] != b"\0\0":
        raise refuse("it is a zip archive that is cut short or has extra bytes at its end")
    count, length, start = struct.unpack("<10xHII2x", end)
    stop = size - END_SIZE
    if locator.startswith(LOCATOR):  # in archives above 4 GB and in all that torch writes
        stop -= sum(END_64_SIZES)
        if len(record) < 56 or not record.startswith(END_64) or struct.unpack("<8xQ4x", locator) != (stop,):
            raise refuse("the end of this zip archive is damaged")
        count, length, start = struct.unpack("<32xQQQ", record)
    if start + length != stop:
        raise refuse("the directory of this zip archive is not where it should be")
    if count > MAX_ENTRIES or length > MAX_DIRECTORY:
        raise refuse(f"it holds {count} files, listed in {length} bytes; at most {MAX_ENTRIES} are read", "")

    zipped = ZipFile(file)
    entries = sorted(zipped.infolist(), key=lambda entry: entry.header_offset)
    if len(entries) != count or len({entry.filename.lower() for entry in entries}) != count:
        raise refuse("this zip archive lists a file twice, or not at all", "; save it again")
    for entry, after in zip(entries, [entry.header_offset for entry in entries[1:]] + [start], strict=True):
        if entry.orig_filename != entry.filename or not (entry.filename.isascii() and entry.filename.isprintable()):
            raise refuse(f"the file name {shown(entry.orig_filename)} in it is not printable ASCII", "; save it again")
        if entry.flag_bits & 0x2061:
            raise refuse(f"{shown(entry.filename)} in it is encrypted", "; save it again, without a password")
        if entry.compress_type not in methods:
            raise refuse(
                f"{shown(entry.filename)} in it is compressed by zip method {entry.compress_type}, which is not read",
                "; save it again with torch.save or numpy.savez",
            )
        stored = entry.compress_size == entry.file_size or entry.compress_type != ZIP_STORED
        if not stored or entry.header_offset + 30 + len(entry.filename) + entry.compress_size > after:
            raise refuse(f"{shown(entry.filename)} in it has another size than listed, or overlaps another file")
    return zipped


def _likely_format(head: bytes) -> str:
    """Guess from its first bytes what a file is that should be a zip archive."""
    if head[257:262] == b"ustar":
        return "it is a tar archive"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "it is a safetensors file under another name"
    if head.lstrip()[:1] in (b"{", b"["):
        return "it is JSON"
    return looks_like(head) or f"it is not a zip archive; it begins with {shown(head[:16])}"
