"""The model card: a Markdown description of an exported Q for its users."""

from collections.abc import Mapping
from typing import Any

from adadfq_jax.deploy.network import NetworkInfo
from adadfq_jax.network import Graph
from adadfq_jax.runtime import tables

CARD_FILE = "model_card.md"
_ADADFQ = "*Adaptive Data-Free Quantization*, CVPR 2023, arXiv 2303.06869"
_UNKNOWN = "not known: the file was exported without its run"


def model_card(
    info: NetworkInfo,
    graph: Graph,
    exported: Mapping[str, Any],
    run: Mapping[str, Any] | None,
) -> str:
    """Return the card's text.

    Args:
      info: Q's description.
      graph: Q's graph.
      exported: the contents of export.json; `files` is empty where none was made.
      run: the contents of the run's summary.json, and besides them `teacher`, P's file
        name or address, and `teacher_sha256`; None where the run is not known.
    """
    size = " x ".join(map(str, info.image_shape))
    run = run or {}
    lines = [
        f"# {info.model} {info.bits}",
        "",
        f"An image classifier, {size} images to {info.num_classes} classes, quantized"
        f" {_method(run)}.",
        "",
        f"- **Data used:** none. {_data_sentence(run)}",
        f"- **Full-precision network:** {_teacher(run)}.",
        f"- **Bits:** kernels {info.weight_bits}, per output channel; activations"
        f" {info.act_bits}, per tensor, {_PLACES_TEXT[info.places]}.",
        f"- **In float32:** {_in_float(graph)}.",
        f"- **First and last layer:** {_ends_sentence(info)}",
        *_layers_line(info, graph),
        f"- **Input:** (pixels / 255 - mean) / std, mean {_numbers(info.mean)}, std"
        f" {_numbers(info.std)}, unless the table says that a file takes pixels.",
        f"- **Accuracy:** {_accuracy(run)}",
        f"- **Command:** {_command(run)}",
        f"- **Versions:** {_versions(run.get('versions') or exported['versions'])}",
        "",
        "## Files",
        "",
        f"`{exported['file']}`: {exported['bytes']:,} bytes, SHA-256"
        f" `{exported['sha256']}`.",
        "",
    ]
    lines += [_file_table(exported)] if exported["files"] else []
    lines += _remarks(info.bits_by_name(graph), exported)
    if any(made["top1"] is None for made in exported["files"].values()):
        lines += ["", "There were no labelled images: only the classes were compared."]
    return "\n".join(lines) + "\n"


def _latency_head(count: str) -> str:
    return f"ms, {count} image{'' if count == '1' else 's'}"


def _file_table(exported: Mapping[str, Any]) -> str:
    """Return the table of the exported files and of the same network in float32."""
    latency = exported["float32_latency_ms"]
    heads = ["file", "bytes", *map(_latency_head, latency)]
    heads += ["images", "checked on", "top-1", "Q's", "same class as Q"]
    rows = []
    for made in exported["files"].values():
        rows.append(
            [
                f"`{made['file']}`",
                f"{made['bytes']:,}",
                *(f"{made['latency_ms'][count]:.2f}" for count in latency),
                made["input"],
                f"{made['images']:,} of {made['images_of']}",
                tables.percent(made["top1"]),
                tables.percent(made["q_top1"]),
                f"{100 * made['same_class']:.2f} %",
            ]
        )
    kind = exported["files"][exported["float32_kind"]]["file"]
    sizes = [
        f"{exported['float32_bytes']:,}",
        *(f"{ms:.2f}" for ms in latency.values()),
    ]
    rows.append([f"as `{kind}`, all in float32", *sizes, *["-"] * 5])
    return tables.to_markdown(heads, rows).rstrip()


def _remarks(bits: Mapping[str, int], exported: Mapping[str, Any]) -> list[str]:
    """Say which files are slow, and what the integer file is; bits are by name."""
    float32, lines = exported.get("float32_latency_ms", {}).get("1", 0.0), []
    slow = [
        f"`{made['file']}`"
        for made in exported["files"].values()
        if made["latency_ms"]["1"] > float32
    ]
    if slow:
        lines.append(
            f"- Slower than float32 here, for 1 image: {', '.join(slow)}. What is"
            " measured is the machine of the export."
        )
    integer = exported["files"].get("integer")
    if not integer:
        return ["", *lines] if lines else []
    name = f"`{integer['file']}`"
    options = exported["options"]
    is_symmetric, kept = options["target"] == "symmetric", options["float_layers"]
    how = (
        "is for TensorRT: activations are INT8 with zero point 0, as kernels are, and"
        " biases are float32. ONNX Runtime computes its convolutions in float32."
        if is_symmetric
        else "is for speed: every convolution and product is computed in 8-bit integers"
        + (f", but not {kept}" if kept else "")
        + ". Kernels are INT8 with zero point 0; activations have 256 levels on Q's"
        " ranges."
    )
    lines.append(
        f"- {name} {how} Channels of kernels that did not fit INT8 with Q's integers,"
        f" and were rounded again: {integer['rounded_again']:,}."
    )
    if min(bits.values()) < 8 and not is_symmetric:
        lines.append(
            f"- {name} has the size and the speed of W8A8, whatever Q's bits. Fewer"
            " bits pay on hardware with 4-bit arithmetic, and in the size of"
            f" `{exported['file']}` and of the ONNX file with packed codes."
        )
    lines.append(
        f"- Simplify `{exported['files']['onnx']['file']}` with onnxslim, not with"
        " onnxsim, which moves biases into convolutions, where ONNX Runtime rounds them"
        f" to coarse steps. {name} takes both."
    )
    if max(bits.values()) > 6 or integer["rounded_again"]:
        lines.append(
            "- On x86 CPUs without VNNI, set ONNX Runtime's session option"
            f' `session.x64quantprecision` to "1" for {name}: its sums overflow'
            " otherwise."
        )
    if litert := exported["files"].get("litert"):
        lines.append(
            f"- `{litert['file']}` has the same integers, for LiteRT. It takes one"
            " image, and its last product is computed in 16 bits."
        )
    if layer := integer.get("worst_layer"):
        lines.append(
            f"- {name} is {integer['q_top1'] - integer['top1']:.1f} points below Q."
            f" Most of it is lost at `{layer}`, which"
            f" `--config.export.float_layers={layer}` keeps in float32."
        )
    return ["", *lines]


def _method(run: Mapping[str, Any]) -> str:
    """Name the recipe that made Q."""
    recipe = run.get("recipe")
    if not recipe:
        return "by adadfq_jax; by which recipe is not known"
    paper = f" (AdaDFQ: {_ADADFQ})" if recipe.startswith("adadfq") else ""
    return f"by adadfq_jax's recipe `{recipe}`{paper}"


def _teacher(run: Mapping[str, Any]) -> str:
    if not run:
        return _UNKNOWN
    name = f"`{run['teacher']}`" if run["teacher"] else "given from Python"
    return f"{name}, SHA-256 of its weights `{run['teacher_sha256']}`"


_PLACES_TEXT = {
    "nonlinearities": "after every nonlinearity that a kernel reads",
    "all": "whatever enters a convolution, a product or a sum, including the images",
}


def _in_float(graph: Graph) -> str:
    """List the parts of the network that are not quantized."""
    norms = "biases and batch norms (in the ONNX file their factors are in the kernels'"
    found = [f"{norms} scales)"]
    if graph.rule == "nonlinearities":
        found.append("the input images")
        reasons = [entry.reason for entry in graph.kernels]
        linear = sum(bool(reason) and reason != "the image" for reason in reasons)
        if linear:
            count = f"the inputs of {linear} of the {len(reasons)} kernels"
            found.append(f"{count}, which no nonlinearity precedes")
        found.append("sums and pooled features")
    if graph.products:
        found.append(f"{len(graph.products)} products of two activations")
    return f"{', '.join(found)} and the logits"


def _data_sentence(run: Mapping[str, Any]) -> str:
    measured = run.get("dataset")
    if not measured:
        return "A generator made the images that it was trained on."
    return (
        "A generator made the images that it was trained on; the set"
        f" `{measured}` only measured it."
    )


def _layers_line(info: NetworkInfo, graph: Graph) -> list[str]:
    """Return the line on layers with bits of their own, if there are any."""
    if not info.layer_bits:
        return []
    return [
        f"- **Bits per layer:** {info.bits_in_words(graph)}; all others"
        f" W{info.weight_bits}A{info.act_bits}, or W{info.weight_bits} where the"
        " input is not quantized."
    ]


def _ends_sentence(info: NetworkInfo) -> str:
    if info.layer_bits:
        return "see the bits per layer."
    if not info.first_last_bits:
        return "quantized like all others."
    return (
        f"their kernels and the activations that enter the last have"
        f" {info.first_last_bits} bits. This is another setting than"
        f" W{info.weight_bits}A{info.act_bits} throughout: the accuracy is not to be"
        " compared with that."
    )


def _accuracy(run: Mapping[str, Any]) -> str:
    if not run:
        return _UNKNOWN
    if run["q_last_top1"] is None:
        return "not measured."
    last, p, best = (
        tables.percent(run[key]) for key in ("q_last_top1", "p_top1", "q_best_top1")
    )
    return (
        f"top-1 {last} after the last step, of this file (P: {p}). Best of the"
        " evaluations on the way, chosen on the test set and so optimistic:"
        f" {best}, step {run['q_best_step']}."
    )


def _command(run: Mapping[str, Any]) -> str:
    return f"`{run['command']}`" if run else _UNKNOWN


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
