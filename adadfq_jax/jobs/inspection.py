"""The job --mode=inspect: say what a file is, and how to quantize it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adadfq_jax import teacher
from adadfq_jax.deploy import quantized_file
from adadfq_jax.runtime import invocation
from adadfq_jax.teacher import hub
from adadfq_jax.training import build


def describe(
    path: str | Path,
    model_name: str = "",
    batch_norms: bool = True,
    image_shape: Sequence[int] = (),
    key: str = "",
) -> str:
    """Describe P's file or a `quantized.safetensors` in some lines.

    They name the kind of file, the network and naming scheme, the numbers of
    parameters and classes and the images' shape, and the command that quantizes the
    file.

    Args:
      path: the file, or hf://OWNER/NAME.
      model_name: the network to read it as, or '' to recognise it.
      batch_norms: see `teacher.load_network`.
      image_shape: (H, W, channels), or () for those of the file.
      key: keys around the weights, see `teacher.load_network`.

    Raises:
      InputError: the file cannot be read, or holds no known network.
    """
    path = hub.located(path)
    if isinstance(path, Path) and quantized_file.is_quantized(path):
        return _describe_quantized(path)
    found = teacher.load_network(
        path, model_name, batch_norms, key=key, image_shape=image_shape or None
    )
    sizes = [found.function.variables[n].size for n in found.function.parameters]
    naming = f" in {found.naming} naming" if found.naming else ""
    height, width, channels = found.image_shape
    size = f", {path.stat().st_size:,} bytes" if isinstance(path, Path) else ""
    lines = [
        f"{found.address or path}: {found.kind}{size}",
        f"network     {found.name}{naming}",
        *(f"note        {note}" for note in found.notes),
        f"parameters  {sum(sizes):,}",
        f"classes     {found.num_classes}",
        f"images      {height} x {width}"
        + ("" if found.tells_size else ", not in the file"),
        f"channels    {channels}",
        *([f"normalised  mean={found.mean}, std={found.std}"] if found.mean else []),
    ]
    wrong = found.defect()
    if found.num_classes < 2:
        wrong = (
            "one output has no classes to tell apart; a classifier of two classes must"
            " have two logits"
        )
    if wrong:
        return "\n".join([*lines, f"quantize    no: {wrong}"])
    flags: dict[str, Any] = {}
    if model_name:
        flags["model"] = found.name
    if key:
        flags["key"] = key
    if not batch_norms:
        flags["batch_norms"] = False
    if not found.tells_size or image_shape:
        flags["image_shape"] = found.image_shape
    lines.append(
        "measured    with --config.eval.data_dir=FOLDER (images in a folder per class)"
    )
    return "\n".join([*lines, "quantize    yes:", *_command(path, found, flags)])


def _describe_quantized(path: Path) -> str:
    network = quantized_file.load_quantized(path)
    info, shapes = network.info, network.function.variables
    parameters = sum(math.prod(shapes[name].shape) for name in network.graph.parameters)
    command = invocation.command("evaluate", "--config=NAME", f"--file={path}")
    own = network.info.bits_in_words(network.graph)
    return "\n".join(
        [
            f"{path}: a quantized network of this package",
            f"network     {info.model}, {info.bits}",
            *([f"layers      {own}; all others as named above"] if own else []),
            f"parameters  {parameters:,}",
            f"classes     {info.num_classes}",
            f"channels    {info.image_shape[-1]}",
            "quantize    no, it is quantized already; measure it with",
            f"    {' '.join(command)}",
            "where NAME stands for the configuration of its run, which names the"
            " evaluation set. A whole run is measured with --workdir alone.",
        ]
    )


def _command(
    path: str | Path, found: teacher.LoadedNetwork, flags: Mapping[str, Any]
) -> list[str]:
    """Return the command that quantizes the file, and what to check before it runs."""
    values = {"path": path, **flags}
    if not found.mean:
        mean, std = build.usual_normalisation(found.name, found.image_shape[2])
        values |= {"mean": mean, "std": std}
    name = path.stem if isinstance(path, Path) else hub.name_of(path)
    config = "any" if invocation.has_subcommands() else _here("configs/any.py", "any")
    parts = [f"--config={config}:w4a4", f"--workdir=runs/{name}-w4a4"]
    parts += [f"--config.teacher.{key}={value}" for key, value in values.items()]
    lines = invocation.command("train", *parts)
    command = " \\\n        ".join(["    " + lines[0], *lines[1:]])
    unknown = [] if found.tells_size else ["size"]
    unknown += [] if found.mean else ["mean and std"]
    if not unknown:
        return [command]
    return [
        command,
        f"The file does not tell the {', '.join(unknown)} of P's images. Check those of"
        " the command.",
    ]


def _here(file: str, name: str) -> str:
    """Return a configuration's file if it is in the current folder, else its name."""
    return file if Path(file).is_file() else name
