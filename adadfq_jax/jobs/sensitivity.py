"""The job --mode=sensitivity: which layers suffer most from few bits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adadfq_jax.jobs import samples
from adadfq_jax.jobs.configuration import load_teacher, resolved
from adadfq_jax.recipes import Recipe
from adadfq_jax.report import run_page
from adadfq_jax.runtime import files
from adadfq_jax.training import sensitivity, workdir
from adadfq_jax.training.short_game import measure_on_images, play_short


def measure(
    config: Any, folder: Path | None, recipe: Recipe | None = None
) -> Iterator[str]:
    """Measure the layers of P, and say which should have more bits.

    Args:
      config: the configuration; its `quant` says how ranges are chosen and at how many
        bits the layers are ranked.
      folder: the folder of a run, whose G makes the images. It gets sensitivity.json,
        and its report a figure. Without it, or where there is no checkpoint, a short
        game trains a G.
      recipe: see `configuration.resolved`.

    Yields:
      The table, the advice, and the files.

    Raises:
      InputError: the configuration or P's file cannot be used, or the folder holds a
        run of another configuration.
    """
    with resolved(config, recipe) as spec:
        function, spec = load_teacher(spec)
        is_run = folder is not None and (folder / workdir.IDENTITY_FILE).exists()
        if folder is not None and is_run:
            assembly = samples.assemble(spec, folder, function)
            samples.check_run(assembly, folder, function)
            state = samples.restore(assembly, folder)
            teacher = assembly.teacher(function.variables)
        else:
            size = spec.game.batch_size
            assembly, teacher, state = play_short(spec, size, function)
        layers = measure_on_images(assembly, teacher, state)
    bits = min(spec.quant.weight_bits, 4)
    advice = sensitivity.advise(layers, bits)
    yield sensitivity.table(layers, bits)
    yield advice
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / workdir.SENSITIVITY_FILE
    found = {"ranked_at": bits, "advice": advice, "layers": sensitivity.to_json(layers)}
    files.write_json(file, found)
    yield str(file)
    if is_run:
        yield run_page.attempt(folder)
