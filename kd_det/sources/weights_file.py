"""Whether a weights file is whole and harmless, found out before its weights are used."""

import hashlib
import pickle
import string
import zipfile
from typing import Any

_ZIP = b"PK\x03\x04"  # how PyTorch tells its zip format from the legacy one
_PICKLE = b"\x80"
_HASH_DIGITS = 8, 64
# What pickles of NumPy arrays are made of; anything else could run code.
_HARMLESS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def file_fingerprint(path: str) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(text: str) -> str:
    """
    The expected SHA-256 of a file, or its leading digits, in lower case; empty stays empty.

    Raises:
        ValueError: if it is not 8 to 64 hexadecimal digits.
    """
    least, most = _HASH_DIGITS
    if text and not (least <= len(text) <= most and set(text) <= set(string.hexdigits)):
        raise ValueError(
            f"sha256 is {least} to {most} hexadecimal digits, the beginning or all of what "
            f"sha256sum prints for the file, but got '{text}'."
        )
    return text.lower()


def check_whole(path: str) -> None:
    """
    Verify the checksum of every record of a file in PyTorch's zip format, at the speed of CRC-32;
    PyTorch's own reader does not, so that a flipped bit would become a weight. The legacy format
    and pickles carry no checksum: only their first byte is looked at.

    Raises:
        ValueError: if the file is in none of these formats, a record is damaged, or it is cut off.
    """
    with open(path, "rb") as f:
        begin = f.read(len(_ZIP))
    if begin != _ZIP:
        # Python 2's first pickles have no mark.
        if begin[:1] == _PICKLE or (begin and path.endswith(".pkl")):
            return
        raise ValueError("it is empty" if not begin else "it is neither PyTorch's nor a pickle")
    try:
        with zipfile.ZipFile(path) as archive:
            # zipfile looks past bytes before the archive, where PyTorch's reader would read them.
            if min((record.header_offset for record in archive.infolist()), default=1):
                raise ValueError("its records are not where its directory says")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as e:
        raise ValueError(f"it is damaged or cut off: {e}") from e
    if damaged is not None:
        raise ValueError(f"it is damaged: its record '{damaged}' does not match its checksum")


def load_pickle(path: str) -> Any:
    """
    Read a pickle of NumPy arrays, as Detectron2's model zoo has them, and run no code of it.

    Raises:
        pickle.UnpicklingError: if it asks for anything but arrays in containers.
    """
    with open(path, "rb") as f:
        # latin1: the zoo's files were written by Python 2.
        return _ArraysOnly(f, encoding="latin1").load()


# The unpickler in Python: that in C allocates, and touches, as much memory as a damaged memo index
# says, and a process that is killed for its memory can say nothing.
class _ArraysOnly(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, where only NumPy arrays are expected"
            )
        return super().find_class(module, name)
