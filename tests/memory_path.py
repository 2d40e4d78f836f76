"""A storage that only etils.epath opens: `memory://`, of fsspec, in this process."""

import fsspec
from etils import epath

SCHEME = "memory://"


@epath.register_path_cls(SCHEME)
class MemoryPath(epath.Path):
    """memory://a/b is /a/b of fsspec's memory file system."""

    files = fsspec.filesystem("memory")

    def __new__(cls, *parts):
        first = str(parts[0]).removeprefix(SCHEME)
        return super().__new__(cls, "/" + first.lstrip("/"), *parts[1:])

    def exists(self):
        return self.files.exists(str(self))

    def is_dir(self):
        return self.files.isdir(str(self))

    def iterdir(self):
        for name in self.files.ls(str(self), detail=False):
            yield type(self)(name)

    def open(self, mode="r", encoding=None, errors=None, **kwargs):
        return self.files.open(str(self), mode, encoding=encoding, **kwargs)

    def write_bytes(self, data):
        self.files.pipe_file(str(self), data)

    def mkdir(self, mode=None, parents=False, exist_ok=False):
        self.files.makedirs(str(self), exist_ok=exist_ok)

    def unlink(self, missing_ok=False):
        if not missing_ok or self.exists():
            self.files.rm_file(str(self))


def empty_bucket():
    """The name of an empty folder."""
    MemoryPath.files.store.clear()
    MemoryPath.files.pseudo_dirs[:] = [""]
    return f"{SCHEME}bucket/run"


def files_of(bucket):
    """Names and contents."""
    found = MemoryPath.files.find(str(epath.Path(bucket)))
    start = len(str(epath.Path(bucket))) + 1
    return {name[start:]: MemoryPath.files.cat_file(name) for name in found}
