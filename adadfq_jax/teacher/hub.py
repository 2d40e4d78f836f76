"""P in a repository of the Hugging Face Hub: `hf://OWNER/NAME` or with `@REVISION`.

The package huggingface_hub fetches `config.json` and the weights into its own cache.
What is in the cache is taken from there, without a network. timm's `config.json` and
that of transformers' ResNets say what a state dict does not: which of several networks
with the same names it is, and how its images are normalised.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adadfq_jax import models
from adadfq_jax.errors import InputError, first_line, short
from adadfq_jax.runtime import extras
from adadfq_jax.teacher.recognition import RESNETS

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # a pickle only without the first
PREPROCESSOR = "preprocessor_config.json"  # of transformers
_PAGES = r"(?:www\.)?(?:huggingface\.co|hf\.co)"
_MOST_BYTES = 2**24  # of a JSON file
_MOST = 8192  # of a number in it, such as the pixels along a side

# timm's name of a network -> this package's. They are the same function.
ARCHITECTURES = {
    **{name: name for name in ("resnet18", "resnet34")},
    "resnet50": "resnet50b",
    "mobilenetv2_100": "mobilenet_v2",
    **{f"vgg{depth}_bn": f"vgg{depth}_bn" for depth in models.VGG_UNITS},
    **{
        f"{form}efficientnet_lite{n}": f"{form}efficientnet_lite{n}"
        for n in range(len(models.LITE_FACTORS))
        for form in ("", "tf_")
    },
}
# Arguments of timm's networks that the weights show, or that matter in training only.
_HARMLESS = re.compile(r"num_classes|in_chans|img_size|drop_\w+|\w+_drop_rate")


class Repository(NamedTuple):
    """The file of P in a repository, and the facts on P that the repository has.

    Attributes:
      address: hf://OWNER/NAME@REVISION, where the revision is the commit, if known.
      name: NAME.
      weights: the file, in the cache.
      model: a name of `models.names()`, '' where no architecture is given.
      num_classes: length of the logits, 0 where it is not given.
      image_size: (H, W), () where it is not given.
      mean: of the normalisation per channel, () where it is not given.
      std: see `mean`.
      note: what the user should know, or ''.
    """

    address: str
    name: str
    weights: Path
    model: str
    num_classes: int = 0
    image_size: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    note: str = ""

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Name the repository in errors of its file that are raised within."""
        try:
            yield
        except InputError as error:
            message = str(error).replace(str(self.weights), self.address)
            raise InputError(message, *error.arguments) from error


def is_hub(path: str | Path) -> bool:
    """Tell whether a path is an address, not a file; a Path has a slash less."""
    return re.match("(hf|https?):/", str(path)) is not None


def located(path: str | Path) -> str | Path:
    """Return the path of a file with `~` expanded, or the address of a repository."""
    return _Place.of(path).address if is_hub(path) else Path(path).expanduser()


def name_of(address: str | Path) -> str:
    """Return NAME of hf://OWNER/NAME@REVISION."""
    return _Place.of(address).repository.partition("/")[2]


def source(path: str | Path) -> str:
    """Return the name of a file, or the address of a repository."""
    return str(path) if is_hub(path) else Path(path).name


def in_cache(path: str | Path) -> Path | None:
    """Return the file of a repository's weights, None if it is not in the cache."""
    place = _Place.of(path)
    try:
        import huggingface_hub
    except ImportError:
        return None
    for name in WEIGHTS:
        found = huggingface_hub.try_to_load_from_cache(
            place.repository, name, revision=place.revision
        )
        if isinstance(found, str):
            return Path(found)
    return None


class _Place(NamedTuple):
    """'OWNER/NAME', and a branch, tag or commit there, None for the usual branch."""

    repository: str
    revision: str | None

    @classmethod
    def of(cls, path: str | Path) -> "_Place":
        found = re.fullmatch(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@(\S+))?", str(path))
        if found is None:
            page = re.match(rf"https?:/+{_PAGES}/([\w.-]+/[\w.-]+)", str(path))
            raise InputError(
                f"{short(str(path))}: must be hf://OWNER/NAME or"
                " hf://OWNER/NAME@REVISION, as in"
                f" hf://{page[1] if page else 'timm/resnet18.a1_in1k'}"
            )
        return cls(found[1], found[2])

    def of_commit(self, file: Path) -> "_Place":
        """Return the place of the files of the same commit as a file of the cache."""
        commit = file.parent.name
        known = re.fullmatch("[0-9a-f]{40}", commit)
        return self._replace(revision=commit) if known else self

    @property
    def address(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}"

    def get(self, name: str) -> Path | None:
        """Return a file, from the cache or else fetched; None if there is none."""
        import huggingface_hub  # here: it is an optional extra
        from huggingface_hub import errors

        repository, revision = self
        try:
            known = huggingface_hub.try_to_load_from_cache(
                repository, name, revision=revision
            )
            if known is None:
                known = huggingface_hub.hf_hub_download(
                    repository, name, revision=revision
                )
            return Path(known) if isinstance(known, str | Path) else None
        except Exception as error:  # of huggingface_hub or its HTTP client
            why = f"cannot be fetched ({first_line(error)})"
            for kind, text in _FAILURES.items():
                if isinstance(error, getattr(errors, kind)):
                    why = text
                    break
            if why:
                raise InputError(f"{self.address}: {why}") from error
            return None


# What errors of huggingface_hub mean; an error may be of a later kind, too.
_FAILURES = {
    "LocalEntryNotFoundError": "it is not in the cache, and cannot be reached; check"
    " the network, or give a file",
    "EntryNotFoundError": "",  # there is no such file
    "GatedRepoError": "it is gated: accept its terms on huggingface.co, and log in with"
    " the command hf auth login",
    "RepositoryNotFoundError": "no such repository, or a private one, for which the"
    " command hf auth login logs in",
    "RevisionNotFoundError": "no such revision in the repository",
}


def fetch(path: str | Path, model_name: str = "") -> Repository:
    """Fetch what a repository says of P, and the file with its weights.

    Args:
      path: its address.
      model_name: a name of `models.names()`, or '' to take the repository's.

    Raises:
      InputError: huggingface_hub is not installed, the repository cannot be fetched, or
        it holds no network that is known.
    """
    place = _Place.of(path)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise extras.missing(place.address, "huggingface_hub", "hub") from error
    file = place.get(CONFIG)
    config = {}
    if file is not None:
        place = place.of_commit(file)
        config = _object(place, file)
    try:
        if "model_type" in config and "architecture" not in config:
            preprocessor = place.get(PREPROCESSOR)
            values = {} if preprocessor is None else _object(place, preprocessor)
            facts = _of_transformers(config, values, model_name)
        else:
            facts = _of_timm(config, model_name)
    except InputError as error:
        if str(error).startswith(place.address):
            raise
        raise InputError(f"{place.address}: {error}", *error.arguments) from error
    for name in WEIGHTS:
        weights = place.get(name)
        if weights is not None:
            address = place.of_commit(weights).address
            return Repository(address, name_of(address), weights, **facts)
    raise InputError(
        f"{place.address}: no weights there: neither {' nor '.join(WEIGHTS)}"
    )


def _object(place: _Place, file: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a repository."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place.address}: its {file.name} cannot be read ({first_line(error)})"
        ) from error


def _of_timm(config: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """Return what timm's config.json tells, as attributes of a `Repository`."""
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, Mapping):
        cfg = config  # as timm wrote it at first
    architecture = str(config.get("architecture") or "")
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise InputError(f"its {CONFIG} has model_args={_shown(arguments)}")
    arguments = {"global_pool": config.get("global_pool", "avg"), **arguments}
    other = [
        f"{name}={_shown(value)}"
        for name, value in arguments.items()
        if not _HARMLESS.fullmatch(name) and (name, value) != ("global_pool", "avg")
    ]
    network = {"model": model_name}
    if architecture:
        known, shown = ARCHITECTURES.get(architecture, ""), [architecture, *other]
        network = _network(model_name, known, " ".join(shown), not other)
    channels, *size = _numbers(cfg, "input_size", 3, whole=True) or (0,)
    return {
        **network,
        "num_classes": _count({**cfg, **config}, "num_classes"),
        "image_size": tuple(size),
        **_normalisation(cfg, "mean", "std", count=int(channels)),
    }


def _of_transformers(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], model_name: str
) -> dict[str, Any]:
    """Return what the files of transformers tell, as attributes of a `Repository`."""
    in_first = config.get("downsample_in_bottleneck", False)
    bottlenecks = config.get("layer_type", "bottleneck") == "bottleneck"
    depths = _numbers(config, "depths", whole=True)
    known = RESNETS.get((depths, bottlenecks), "")
    known = f"{known}b" if known == "resnet50" and not in_first else known
    if config["model_type"] != "resnet":
        known = ""
    plain = config.get("hidden_act", "relu") == "relu"
    plain = plain and not config.get("downsample_in_first_stage", False)
    shown = [f"{key}={_shown(config[key])}" for key in _RESNET if key in config]
    architecture = " ".join([str(config["model_type"]), *shown])
    for name, usual in _PIXELS.items():
        value = preprocessor.get(name, usual)
        if not isinstance(value, int | float) or not math.isclose(
            value, usual, rel_tol=1e-4
        ):
            raise InputError(
                f"its {PREPROCESSOR} has {name}={_shown(value)}; its images must be"
                " pixels / 255, normalised by a mean and std"
            )
    crops = preprocessor.get("do_center_crop") is not False
    size = (crops and preprocessor.get("crop_size")) or preprocessor.get("size") or {}
    if isinstance(size, Mapping):
        # The other edge has any length where the images are not cropped.
        side = size.get("shortest_edge") if crops else None
        size = [size.get("height", side), size.get("width", side)]
    elif not isinstance(size, list):
        size = [size, size] if crops else [None]
    sizes = {"size": None if None in size else size}
    labels = config.get("id2label")
    return {
        **_network(model_name, known, architecture, plain),
        "num_classes": len(labels) if isinstance(labels, Mapping) else 0,
        "image_size": _numbers(sizes, "size", 2, whole=True),
        **_normalisation(preprocessor, "image_mean", "image_std"),
    }


# What the images of transformers must be made with.
_PIXELS = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
# What a ResNet of transformers can be made of.
_RESNET = ("depths", "layer_type", "hidden_act", "downsample_in_first_stage")


def _network(
    named: str, known: str, architecture: str, is_plain: bool
) -> dict[str, str]:
    """Return the network, and a note on it, as attributes of a `Repository`.

    Args:
      named: the network that the configuration names, or ''.
      known: the one that is of the repository's architecture, '' for others.
      architecture: what the repository says, in words.
      is_plain: whether nothing there makes it another function than `known`.

    Raises:
      InputError: they are of different networks, or the network is not known.
    """
    if named and not known:
        note = f"the architecture {short(architecture)} of its {CONFIG} is not known; "
        return {"model": named, "note": f"{note}it is read as teacher.model={named}"}
    if not known or not is_plain:
        raise _unknown(architecture)
    # The shapes tell whether it has the stem and the head for small images.
    if named and named.removesuffix("_cifar") != known:
        raise InputError(
            f"its {CONFIG} is of {known}, and teacher.model={named} is another network:"
            f" leave teacher.model out; or, where {CONFIG} is wrong, give a downloaded"
            " file of the weights as teacher.path",
            "teacher.model",
            "teacher.path",
        )
    return {"model": named or known}


def _unknown(architecture: str) -> InputError:
    return InputError(
        f"the architecture {short(architecture)} is not known; known are"
        f" {', '.join(ARCHITECTURES)} of timm and ResNet-18, 34 and 50 of transformers;"
        " others are read from ONNX files, or given from Python"
    )


def _normalisation(
    config: Mapping[str, Any], *names: str, count: int = 0
) -> dict[str, tuple[float, ...]]:
    """Return the mean and std of pixels in [0, 1], by names of a `Repository`."""
    mean, std = (_numbers(config, name, count) for name in names)
    if len(mean) != len(std) or not (
        all(0 <= x <= 1 for x in mean) and all(0 < x <= 1 for x in std)
    ):
        shown = " and ".join(f"{name}={_shown(config.get(name))}" for name in names)
        raise InputError(
            f"its files have {shown}: both must be of pixels in [0, 1], with a value"
            " per channel, std above 0"
        )
    return {"mean": mean, "std": std}


def _shown(value: Any) -> str:
    return short(json.dumps(value), 40)


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name) or 0
    if type(value) is not int or value < 0:
        raise InputError(f"its {CONFIG} has {name}={_shown(value)}")
    return value


def _numbers(
    config: Mapping[str, Any], name: str, count: int = 0, whole: bool = False
) -> tuple[Any, ...]:
    """Return a list of numbers, () where there is none.

    Args:
      config: the values by name.
      name: of the list.
      count: its length, 0 for any.
      whole: whether they are whole numbers from 1.
    """
    values = config.get(name)
    if values is None:
        return ()
    kinds = (int,) if whole else (int, float)
    if (
        not isinstance(values, list | tuple)
        or len(values) != (count or len(values))
        or not all(type(x) in kinds for x in values)
        or not all((1 if whole else -_MOST) <= x <= _MOST for x in values)
    ):
        raise InputError(f"its {name} is {_shown(values)}")
    return tuple(values) if whole else tuple(map(float, values))
