"""The search for a known network among the tensors of a checkpoint, however wrapped.

The names of all tensors of a file are one list: the keys of the mappings around a
tensor and its own key, joined by dots. A network is found wherever the kernel of its
first convolution stands under any prefix and every other variable of its body stands
under the same prefix. Whether a mapping, a wrapping module or torch.compile put the
prefix there makes no difference. The last layer may stand elsewhere and have any name:
it is known by its shape.
"""

import bisect
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from adadfq_jax.errors import InputError, short
from adadfq_jax.teacher import naming
from adadfq_jax.teacher.recognition import SIGNS, Recognised, recognise

# Modules around another one, which may stand anywhere within a name.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
# Beginnings that belong to a scheme's names but may be called anything.
_ROOTS = ("features", "resnet")
_LAST_LAYERS = ("head", "classifier", "fc", "linear", "output", "logits")
_AVERAGED = re.compile(
    r"ema(?![a-z])|averag|avg|swa|teacher|target|momentum|shadow", re.IGNORECASE
)
# Counts of batches and, by profilers, of operations: no part of the function.
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
_MOST_WORK = 2_000_000  # names to look at; a checkpoint takes some thousands
_NO_BATCH_NORMS = (
    "it has no batch norms (no running_mean), and the method learns from their"
    " statistics"
)

Parts = tuple[str, ...]


class Found(NamedTuple):
    """A network in a file.

    Attributes:
      model: a name of `models.names()`.
      scheme: a name of `naming.schemes`.
      note: what is to be known about the choice, or ''.
      names: path of each variable -> its name in the file; '' stands for a bias of
        zeros, which the file leaves out.
      prefix: what stands before the names of the network.
      left_out: names of the tensors of the file that are not of the network.
    """

    model: str
    scheme: str
    note: str
    names: Mapping[naming.Path, str]
    prefix: Parts = ()
    left_out: tuple[str, ...] = ()


class _Problem(InputError):
    """Why a candidate is not the network; `missing` counts the keys that it lacks."""

    def __init__(self, missing: float, message: str):
        super().__init__(message)
        self.missing = missing


_UNKNOWN = float("inf")  # a network that is in no table lacks more than any other
_CERTAIN = -1  # what is sure to be meant


class _Body(NamedTuple):
    """All variables of a network but those of its last layer.

    Attributes:
      known: the network.
      prefix: what stands before the names of the body.
      outer: what stands before the names of the whole network.
      root: the beginning of the scheme's keys that the prefix stands for.
      names: path -> name in the file.
    """

    known: Recognised
    prefix: Parts
    outer: Parts
    root: str
    names: dict[naming.Path, str]


def is_tensor(entry: Any) -> bool:
    """Tell whether an entry of a file is a tensor, rather than a text on what it is."""
    return hasattr(entry, "shape")


class _Names:
    """The names of a file, looked up by their prefix."""

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = entries
        self.under = functools.cache(self._under)
        self._sorted = sorted(entries)
        self._work = 0

    def _under(self, prefix: Parts) -> dict[str, str]:
        """Return the names under a prefix, by what they are without it and wrappers."""
        before = "".join(f"{part}." for part in prefix)
        found: dict[str, str] = {}
        for name in self._sorted[bisect.bisect_left(self._sorted, before) :]:
            if not name.startswith(before):
                break
            self._work += 1
            if self._work > _MOST_WORK:
                raise InputError("too many of its names could be those of a network")
            rest = name[len(before) :]
            plain = ".".join(part for part in rest.split(".") if part not in _WRAPPERS)
            if plain == rest or plain not in found:
                found[plain] = name
        return found

    def prefixes(self, keys: Iterable[str]) -> list[Parts]:
        """Return what stands before one of these keys, wherever it is."""
        wanted = [(key, key.count(".") + 1) for key in keys]
        found: dict[Parts, None] = {}
        for name in self.entries:
            parts = name.split(".")
            places = [i for i, part in enumerate(parts) if part not in _WRAPPERS]
            for key, count in wanted:
                if ".".join(parts[i] for i in places[-count:]) == key:
                    found[tuple(parts[: places[-count]])] = None
        return list(found)

    def left(self, used: Collection[str]) -> list[str]:
        """Return the names of the tensors that are not used, without counters."""
        return [
            name
            for name, entry in self.entries.items()
            if is_tensor(entry) and name not in used and not name.endswith(_COUNTERS)
        ]


def find(
    entries: Mapping[str, Any], model_name: str = "", key: str = "", file: str = ""
) -> Found:
    """Find the network in a file.

    Args:
      entries: everything in the file by name, see `torch_file.Contents`.
      model_name: the network that it must be, or '' to recognise it.
      key: keys around the weights that are meant, where there are several.
      file: name of the file, see `recognise`.

    Raises:
      InputError: there is no known network, or none can be chosen.
    """
    names = _Names(entries)
    bodies: list[_Body] = []
    found: list[Found] = []
    problems: list[_Problem] = []
    for known, prefix, root in _candidates(names, model_name, file, problems):
        try:
            bodies.append(_body(names, known, prefix, root))
        except _Problem as problem:
            problems.append(problem)
    taken = {name for body in bodies for name in body.names.values()}
    for body in bodies:
        try:
            found.append(_complete(names, body, taken))
        except _Problem as problem:
            problems.append(problem)
    if found:
        # Two schemes may have the same names but for the last layer's.
        return _chosen(names, sorted(found, key=lambda one: len(one.note)), key)
    first = min(problems, key=lambda one: one.missing, default=_Problem(_UNKNOWN, ""))
    if first.missing > _CERTAIN:
        _refuse_modules(entries)
    if not problems or not any(map(is_tensor, entries.values())):
        raise InputError(_unknown(entries))
    more = ""
    if not any(name.endswith("running_mean") for name in entries):
        more = f"; {_NO_BATCH_NORMS}"
    elif model_name and first.missing >= 0:
        more = _hint(entries, model_name, file)
    raise InputError(f"{first}{more}")


def _candidates(
    names: _Names, model_name: str, file: str, problems: list[_Problem]
) -> Iterator[tuple[Recognised, Parts, str]]:
    """Yield each network that may be there, the prefix and the root of its body."""
    if model_name:
        for scheme, root, stem in _stems(model_name):
            at_top = tuple(root.split(".")[:-1])
            for prefix in names.prefixes([stem]) or [at_top]:
                yield Recognised(model_name, scheme), prefix, root
        return
    for sign in SIGNS:
        for prefix in names.prefixes(sign.stems):
            body = names.under(prefix).items()
            try:
                options = recognise(sign, {k: names.entries[n] for k, n in body}, file)
            except InputError as error:
                problems.append(_Problem(_UNKNOWN, str(error)))
                continue
            for known in options:
                roots = {scheme: root for scheme, root, _ in _stems(known.model)}
                yield known, prefix, roots[known.scheme]


@functools.cache
def _stems(model_name: str) -> list[tuple[str, str, str]]:
    """Return each scheme of a network with its root and the key of its first kernel."""
    found = []
    for scheme, key_of in naming.schemes(model_name).items():
        stem = key_of(naming.place(naming.STEM))
        first, _, rest = stem.partition(".")
        is_root = first in _ROOTS
        found.append(
            (scheme, f"{first}." if is_root else "", rest if is_root else stem)
        )
    return found


def _body(names: _Names, known: Recognised, prefix: Parts, root: str) -> _Body:
    """Find every variable of a network but those of the last layer.

    Raises:
      _Problem: one is missing, or is no tensor.
    """
    outer = prefix
    if root:
        while outer and outer[-1] in _WRAPPERS:
            outer = outer[:-1]
        outer = outer[:-1]
    wanted = naming.keys(known.model, known.scheme, naming.shapes(known.model))
    found, missing = {}, []
    for key, path in wanted.items():
        if path[1] == naming.OUTPUT:
            continue
        inside = bool(root) and key.startswith(root)
        under = names.under(prefix if inside else outer)
        name = under.get(key.removeprefix(root) if inside else key)
        if name is None:
            missing.append((key, path))
        else:
            _require_tensor(names, name)
            found[path] = name
    biases = [(k, p) for k, p in wanted.items() if p[-2:] == ("conv", "bias")]
    if biases and missing == biases:  # batch norms follow, with biases of their own
        missing, found = [], found | {path: "" for _, path in biases}
    body = _Body(known, prefix, outer, root, found)
    if missing:
        keys = sorted(key for key, _ in missing)
        extra = _extra(names, body, set(found.values()))
        lacks_last = not any(
            key in names.under(outer)
            for key, path in wanted.items()
            if path[1] == naming.OUTPUT
        )
        raise _Problem(len(keys) + lacks_last, _differing(known, keys, extra))
    return body


def _require_tensor(names: _Names, name: str) -> None:
    entry = names.entries[name]
    if not is_tensor(entry):
        raise _Problem(_CERTAIN, f"{short(name)} is {entry}, not a tensor")


def _kind(key: str) -> str:
    """Return the first part of a key without numbers: 'layer' of 'layer1.0.conv1'."""
    return re.sub(r"\d+", "", key.split(".")[0])


def _extra(names: _Names, body: _Body, used: Collection[str]) -> list[str]:
    """Return the tensors among those of the body that the network does not have."""
    under = {name: rest for rest, name in names.under(body.prefix).items()}
    kinds = {_kind(under[name]) for name in body.names.values() if name in under}
    return [
        name
        for name in names.left(used)
        if name in under and _kind(under[name]) in kinds
    ]


def _differing(known: Recognised, missing: list[str], extra: list[str]) -> str:
    return (
        f"this is not a {known.model} in {known.scheme} naming:"
        f" {_listing('missing', missing)}; {_listing('extra', extra)}"
    )


def _listing(
    what: str, names: Collection[str], most: int = 5, count: int | None = None
) -> str:
    """Return a count and the first names, as in 'missing 2: fc.weight, fc.bias'.

    The count is that of the names, unless some of them stand for several.
    """
    shown = ", ".join(short(name) for name in list(names)[:most]) or "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {len(names) if count is None else count}: {shown}{more}"


def _complete(names: _Names, body: _Body, taken: set[str]) -> Found:
    """Add the last layer to a body.

    Args:
      names: of the file.
      body: the body.
      taken: names of all bodies.

    Raises:
      _Problem: there is no last layer, none can be chosen, or something stands beside
        it or in the body that the network does not have.
    """
    model, scheme, note = body.known
    key_of = naming.schemes(model)[scheme]
    kernel = next(p for p in naming.shapes(model) if p[1:] == naming.LAST)
    own = names.under(body.outer).get(key_of(naming.place(kernel)), "")
    if own:
        _require_tensor(names, own)
    head = own
    if not head:
        head = _last_layer(names, body, taken)
        note = "; ".join(filter(None, (note, f"its last layer is {short(head)}")))
    found = {**body.names, kernel: head}
    classes = names.entries[head].shape[:1]

    # What stands beside the last layer, in the part of the network that has both.
    parts = head.split(".")
    scope = _shared(body.outer, parts)
    around = ".".join(parts[: scope + 1]) + "."
    used = set(found.values())
    bias_path = (*kernel[:-1], "bias")
    if bias_path in naming.shapes(model):
        bias = head.removesuffix("weight") + "bias"
        if bias in names.entries:
            _require_tensor(names, bias)
            found[bias_path] = bias
            used.add(bias)
        elif own or any(
            names.entries[name].shape == classes and _shared(parts, name) >= scope
            for name in names.left(taken | used)
        ):
            raise _Problem(1, _differing(body.known, [bias], []))
        else:
            found[bias_path] = ""
    if extra := _extra(names, body, used):
        raise _Problem(len(extra), _differing(body.known, [], extra))
    for name in names.left(taken | used):
        shape = names.entries[name].shape
        is_next = _is_dense(name, shape) and shape[1:2] == classes
        is_norm = name.endswith(".running_mean") and name.count(".") == scope + 1
        is_near = _shared(body.outer, name) >= len(body.outer) - 1
        if name.startswith(around) or (is_near and (is_next or is_norm)):
            raise _Problem(
                0,
                f"a {model} with more than one layer behind its body: {short(name)}"
                f" stands beside {short(head)}; give the network from Python",
            )
    left = names.left(taken | used)
    return Found(model, scheme, note, found, body.prefix, tuple(left))


def _shared(first: Iterable[str], second: Iterable[str] | str) -> int:
    """Count the parts at the beginning that two names have in common."""
    parts = second.split(".") if isinstance(second, str) else second
    count = 0
    for one, other in zip(first, parts, strict=False):
        if one != other:
            break
        count += 1
    return count


def _is_dense(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) >= 2 and set(shape[2:]) <= {1}


def _last_layer(names: _Names, body: _Body, taken: set[str]) -> str:
    """Find the kernel [classes, features] that is nearest to a body."""
    model = body.known.model
    shape = next(s for p, s in naming.shapes(model).items() if p[1:] == naming.LAST)
    features = shape.shape[-2]
    fitting = [
        name
        for name in names.left(taken)
        if _is_dense(name, names.entries[name].shape)
        and names.entries[name].shape[1] == features
    ]
    if not fitting:
        raise _Problem(
            1,
            f"a {model} in {body.known.scheme} naming without its last layer: there is"
            f" no weight of shape (classes, {features}) beside it",
        )
    nearness = {name: _shared(body.outer, name) for name in fitting}
    nearest = [name for name in fitting if nearness[name] == max(nearness.values())]
    usual = [name for name in nearest if name.split(".")[-2] in _LAST_LAYERS]
    if len(nearest) > 1 and len(usual) != 1:
        raise _Problem(
            0,
            f"a {model} with several layers that could be its last one:"
            f" {', '.join(map(short, nearest[:5]))}; keep one of them in the file",
        )
    return (usual if len(nearest) > 1 else nearest)[0]


def _label(found: Found) -> str:
    return ".".join(found.prefix) or "the top level"


def _chosen(names: _Names, found: list[Found], key: str) -> Found:
    """Choose one of several sets of weights: the plain one, or that under the key."""
    labels = ", ".join(dict.fromkeys(f"{short(_label(f))} ({f.model})" for f in found))
    chosen = found
    if key:
        chosen = [one for one in found if f".{key}." in f".{_label(one)}."]
        if not chosen:
            raise InputError(
                f"teacher.key={key!r}: no weights of a known network are under it; they"
                f" are under {labels}",
                "teacher.key",
            )
    if len(chosen) > 1:
        plain = [one for one in chosen if not _AVERAGED.search(_label(one))]
        chosen = plain or chosen
    entries = names.entries
    first, *others = chosen
    for other in others:
        if other.names.keys() != first.names.keys() or not all(
            _same(entries.get(name), entries.get(other.names[path]))
            for path, name in first.names.items()
        ):
            raise InputError(
                f"weights of several networks are in it, under {labels};"
                " teacher.key must name the keys around one of them",
                "teacher.key",
            )
    used = {name for one in found for name in one.names.values()}
    left = tuple(name for name in first.left_out if name not in used)
    first = first._replace(left_out=left)
    notes = [first.note]
    if beside := [one for one in found if one not in chosen]:
        labels = ", ".join(short(_label(one)) for one in beside)
        notes[:0] = [
            f"the weights under {short(_label(first))}; teacher.key chooses others:"
            f" {labels}"
        ]
    elif not key and _AVERAGED.search(_label(first)):
        notes[:0] = [
            f"the weights under {short(_label(first))}, an average by that name: no"
            " plain weights are complete"
        ]
    return first._replace(note="; ".join(filter(None, notes)))


def _same(one: Any, other: Any) -> bool:
    """Tell whether two entries are declared to be the same numbers."""
    return one is other or (isinstance(one, tuple) and one == other)


def _refuse_modules(entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        if not is_tensor(entry) and entry.startswith("a whole pickled module"):
            raise InputError(
                f"{short(name)} is {entry}; only its own code could load it; save"
                " model.state_dict() instead"
            )


def _unknown(entries: Mapping[str, Any]) -> str:
    """Say what is there in place of a known network."""
    tensors = sorted(name for name, entry in entries.items() if is_tensor(entry))
    if not tensors:
        held = [
            f"{short(name)} ({entry})" if isinstance(entry, str) else short(name)
            for name, entry in list(entries.items())[:5]
        ]
        return f"no tensors in it; it holds {', '.join(held) or 'nothing'}"
    some = ", ".join(map(short, tensors[:3]))
    more = "other networks are read from ONNX files, or given from Python"
    if not any(name.endswith("running_mean") for name in tensors):
        more = _NO_BATCH_NORMS
    return (
        f"unknown naming: keys as {some} are those of no known network in the names of"
        " pytorchcv, torchvision, timm, Hugging Face, EfficientNet-PyTorch or He-style"
        f" scripts; {more}"
    )


def left_out(found: Found, most: int = 12) -> str:
    """Name the tensors of the file that are not of the network, or return ''.

    Those of a part of the file with many are named together, as in 'optimizer.* (122)'.
    """
    parts: dict[str, list[str]] = {}
    for name in found.left_out:
        below = name.split(".")[: _shared(found.prefix, name) + 1]
        parts.setdefault(".".join(below), []).append(name)
    listed = []
    for part, names in parts.items():
        listed += names if len(names) <= 4 else [f"{part}.* ({len(names)})"]
    if not listed:
        return ""
    return _listing("tensors left out", listed, most, len(found.left_out))


def _hint(entries: Mapping[str, Any], model_name: str, file: str) -> str:
    """Return what network the names are of, if it is not that of `model_name`."""
    try:
        looks = find(entries, file=file)
    except InputError:
        return ""
    if looks.model == model_name:
        return ""
    return f"; its names are those of a {looks.model} (teacher.model={looks.model})"
