"""Files of P that are to be refused."""

import os
import pickle
import zipfile

from tests import helpers


class Runs:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_malicious(path):
    with zipfile.ZipFile(path, "w") as archive:
        payload = pickle.dumps({"weight": Runs(path.parent / "executed")})
        archive.writestr("archive/data.pkl", payload)


def write_truncated(path):
    whole = (helpers.GOLDEN / "resnet20_cifar10_zip.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def zip_file(path, pickled, data=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in (data or {}).items():
            archive.writestr(f"archive/data/{key}", content)


# A tuple in a million others; one of 2^60 elements, made of itself; a number of 200 KB.
DEEP = b")" + b"\x85" * 1_000_000
