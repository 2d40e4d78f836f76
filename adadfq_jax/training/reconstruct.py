"""Reconstruction as the phase of a run after the game: the blocks train in order.

A block learns on images that the run's G makes. Its inputs in P and in Q are kept on
the devices for all images. Once the block is done, its outputs are the inputs of the
next block.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adadfq_jax import game, quant, settings
from adadfq_jax.game import GameState, Teacher, collectives, rollout
from adadfq_jax.network import kernels
from adadfq_jax.quant import Integers, RangeState
from adadfq_jax.reconstruction import Block, Fixed, Images, Learned, Options, State
from adadfq_jax.reconstruction import start as begin_training
from adadfq_jax.runtime import memory, sharding
from adadfq_jax.training.build import Assembly
from adadfq_jax.training.images import draw_images
from adadfq_jax.training.loop import Callback, advance, next_pause

PHASE = "reconstruct"  # name of the phase in the log


class ReconstructionState(NamedTuple):
    """The state of the reconstruction, as a checkpoint holds it.

    Attributes:
      game: the state at the end of the game.
      finished: the learned values of the blocks that are done.
      current: the state of the block that trains, None after the last block.
    """

    game: GameState
    finished: tuple[Learned, ...]
    current: State | None


class BlockError(NamedTuple):
    """Error of a block's outputs, mean |q - p|^2 / mean |p|^2.

    p is the output of P's block for its input in P. q is the output of Q's block behind
    the reconstructed blocks before it.

    Attributes:
      block: name of the block.
      before: error with the kernels and ranges that the game left.
      after: error with the learned kernels and ranges.
    """

    block: str
    before: float
    after: float


def check_batch(spec: settings.Settings, devices: Sequence[jax.Device]) -> None:
    """Refuse a reconstruction whose batch does not divide over the devices.

    Raises:
      InputError: the batch size is not a multiple of the number of devices.
    """
    own = spec.reconstruction
    if own.iterations and own.batch_size % len(devices):
        settings.refuse(
            "reconstruction.batch_size",
            own.batch_size,
            f"a multiple of the {len(devices)} devices",
        )


def kept_bytes(assembly: Assembly) -> int:
    """Return the bytes of the images, as the inputs and outputs of the largest block.

    While a block trains there are its inputs in P and in Q and its output in P; then
    the output in Q takes the place of the input in P.
    """
    info, own = assembly.info, assembly.spec.reconstruction
    sizes = [math.prod(info.image_shape)]
    sizes += [math.prod(block.shape) for block in assembly.graph.blocks]
    pairs = itertools.pairwise(sizes)
    most = max(before + after + max(before, after) for before, after in pairs)
    return 4 * own.images * most if own.iterations else 0


def check_memory(assembly: Assembly, devices: Sequence[jax.Device]) -> None:
    """Refuse a reconstruction whose images alone do not fit into a device's memory.

    Raises:
      InputError: they do not.
    """
    need, there = kept_bytes(assembly), memory.of_each(sharding.local(devices))
    if there is not None and need > there:
        images = assembly.spec.reconstruction.images
        settings.refuse(
            "reconstruction.images",
            images,
            f"fewer: as inputs and outputs of a block they take {need / 2**30:.1f} GiB"
            f" on each device, which has {there / 2**30:.1f} GiB;"
            f" {_fitting(assembly, need / there)} fit",
        )


def _fitting(assembly: Assembly, times: float) -> int:
    """Return a number of images that fits, in whole batches, with room for the rest."""
    own = assembly.spec.reconstruction
    return max(1, int(own.images / times / 2 / own.batch_size)) * own.batch_size


class _Programs(NamedTuple):
    """A block's compiled functions.

    Attributes:
      iterate: iterations in a dispatch -> the function that takes them.
      p_output: P's block for a batch of images.
      q_output: Q's block for a batch of images.
    """

    iterate: Callable[[int], Callable[..., Any]]
    p_output: Callable[..., Any]
    q_output: Callable[..., Any]


class Reconstruction:
    """The reconstruction with its compiled programs, which equal blocks share.

    Args:
      assembly: the parts of the run, or of one member of a population.
      devices: the devices that take part; the batch must divide over them, see
        `check_batch`.
    """

    def __init__(self, assembly: Assembly, devices: Sequence[jax.Device]):
        own = assembly.spec.reconstruction
        self._assembly, self._devices = assembly, devices
        self._options = Options(
            iterations=own.iterations,
            batch_size=own.batch_size,
            rate=own.rate,
            factor_rate=own.factor_rate,
            penalty=own.penalty,
        )
        graph, self._game_steps = assembly.graph, assembly.spec.game.steps
        self._blocks = [self._block(index) for index in range(len(graph.blocks))]
        self._begin = [jax.jit(block.begin) for block in self._blocks]
        self._kernels = jax.jit(functools.partial(kernels, graph))
        self._known: dict[str, _Programs] = {}

    @property
    def steps(self) -> int:
        """The number of steps of the whole run, including the game."""
        return self._game_steps + len(self._blocks) * self._options.iterations

    @property
    def ends(self) -> list[int]:
        """The steps of the run at which a block is done."""
        return [self._end_of(index) for index in range(len(self._blocks))]

    def step_of(self, state: GameState | ReconstructionState) -> int:
        """Return the number of steps taken in a state at or after the game's end."""
        if isinstance(state, GameState):
            return self._game_steps
        if state.current is None:
            return self.steps
        return int(sharding.fetch(state.current.step))

    def _block(self, index: int, axis_name: str | None = None) -> Block:
        graph, parts = self._assembly.graph, self._assembly.parts
        return Block(graph, index, parts.q_options, self._options, axis_name)

    def _begun(self, state: GameState, teacher: Teacher) -> list[tuple[Fixed, Learned]]:
        """Return each block's fixed values, and its learned values at the start."""
        state = game.to_deploy(state)
        variables = {**teacher.variables, **state.q_params}
        own, ratios = self._kernels(variables), teacher.clip_ratios
        range_ema = self._assembly.parts.q_options.range_ema
        ranges = {
            name: quant.read_range(found, range_ema)
            for name, found in state.q_ranges.items()
        }
        begun = []
        for index, block in enumerate(self._blocks):
            grids, learned = self._begin[index](
                [own[entry.name] for entry in block.kernels],
                [ratios.get(entry.name) for entry in block.kernels],
            )
            fixed = Fixed(
                grids=grids,
                ranges=tuple(ranges[name] for name in block.activations),
                variables=tuple(variables[name] for name in block.variables),
                mean_square=jnp.ones(()),
                first_step=jnp.full((), self._end_of(index - 1), jnp.int32),
            )
            begun.append((fixed, learned))
        return begun

    def _state_after(
        self,
        state: GameState,
        finished: Sequence[Learned],
        begun: Sequence[tuple[Fixed, Learned]],
    ) -> ReconstructionState:
        """Return the state after the `finished` blocks, with the next block begun."""
        index, current = len(finished), None
        if index < len(self._blocks):
            current = begin_training(begun[index][1], self._end_of(index - 1))
        return ReconstructionState(state, tuple(finished), current)

    def like(self, state: GameState, teacher: Teacher, step: int) -> Any:
        """Return a state with the structure and shapes of that in a step's checkpoint.

        Args:
          state: a state of the game.
          teacher: P.
          step: the step of the run.
        """
        if step <= self._game_steps:
            return state

        def shapes(state: GameState, teacher: Teacher) -> ReconstructionState:
            begun = self._begun(state, teacher)
            index = (step - self._game_steps) // self._options.iterations
            return self._state_after(state, [own for _, own in begun[:index]], begun)

        return jax.eval_shape(shapes, state, teacher)

    def draw_images(self, state: GameState, seed: int) -> jax.Array:
        """Make the images that blocks learn from, see `images.draw_images`."""
        own = self._assembly.spec.reconstruction
        return draw_images(self._assembly, state, seed, own.images, own.framed)

    def fit(
        self,
        progress: ReconstructionState | GameState,
        teacher: Teacher,
        seed: int,
        *,
        images: jax.Array | None = None,
        errors: list[BlockError] | None = None,
        per_dispatch: int = 1,
        callbacks: Sequence[Callback] = (),
        stop: Any = None,
    ) -> tuple[ReconstructionState, int]:
        """Reconstruct the remaining blocks, and pause for the callbacks.

        Args:
          progress: the state so far, or the state at the end of the game, on the
            devices.
          teacher: P, on the devices.
          seed: the seed of all random draws.
          images: the images to learn from; None draws them with `draw_images`.
          errors: errors of the blocks that are done; those of the others are appended.
          per_dispatch: number of iterations in a dispatch.
          callbacks: see `loop.fit`; they receive a `ReconstructionState`.
          stop: the phase ends as soon as this is true.

        Returns:
          The state, and the number of steps of the run so far.

        Raises:
          NumericalError: a number is not finite.
        """
        if isinstance(progress, ReconstructionState) and progress.current is None:
            return progress, self.steps
        if images is not None and images.shape[0] % self._options.batch_size:
            raise ValueError("images: must be whole batches")
        errors = [] if errors is None else errors
        state = progress.game if isinstance(progress, ReconstructionState) else progress
        begun = self._begun(state, teacher)
        if not isinstance(progress, ReconstructionState):
            progress = self._state_after(state, (), begun)
        p_kernels = self._kernels(teacher.variables)
        key = self._replicated(jax.random.key(seed))
        x = self._replicated(
            self.draw_images(state, seed) if images is None else images
        )
        p_input, q_input, count, step = x, x, x.shape[0], self.step_of(progress)
        for index, block in enumerate(self._blocks):
            if stop:
                break
            fixed, learned = begun[index]
            programs = self._programs(index, fixed, learned, x=q_input)
            p_output = self._joined(
                self._in_batches(
                    programs.p_output,
                    p_input,
                    [p_kernels[entry.name] for entry in block.kernels],
                    [teacher.variables[name] for name in block.variables],
                ),
                count,
            )
            square = _mean_square(p_output)
            # A block whose outputs are all 0 must not lead to a division by 0.
            mean_square = jnp.where(square > 0, square, 1.0)
            fixed = self._replicated(fixed._replace(mean_square=mean_square))
            if index == len(progress.finished):
                outputs = self._in_batches(programs.q_output, q_input, learned, fixed)
                before = self._error(outputs, p_output, fixed)
                current = self._replicated(progress.current)
                kept = Images(p_input, q_input, p_output)
                end = self._end_of(index)
                while step < end and not stop:
                    pause = next_pause(step, end, callbacks)
                    current, step, means = advance(
                        programs.iterate,
                        current,
                        (fixed, kept, key),
                        *(step, pause),
                        per_dispatch=per_dispatch,
                        stop=stop,
                    )
                    if not means:
                        continue
                    progress = progress._replace(current=current)
                    if step == end:
                        del kept, p_input  # q_output needs the memory
                        outputs = self._in_batches(
                            programs.q_output, q_input, current.learned, fixed
                        )
                        q_output = self._joined(outputs, count)
                        after = self._error(self._split(q_output), p_output, fixed)
                        errors.append(BlockError(block.name, before, after))
                        done = (*progress.finished, current.learned)
                        progress = self._state_after(state, done, begun)
                    found = {"phase": PHASE, "block": block.name, **means}
                    for callback in callbacks:
                        if step < pause or callback.due(step):
                            callback(step, progress, found)
                if step < end:
                    break
            else:  # an earlier start has finished this block
                outputs = self._in_batches(
                    programs.q_output, q_input, progress.finished[index], fixed
                )
                q_output = self._joined(outputs, count)
            p_input, q_input = p_output, q_output
        return progress, step

    def quantized(
        self, progress: ReconstructionState, teacher: Teacher
    ) -> tuple[dict[str, Integers], dict[str, RangeState]]:
        """Return Q's kernels as integers and its activation ranges, by name.

        Args:
          progress: the state at the end of the phase.
          teacher: P.
        """
        integers: dict[str, Integers] = {}
        ranges: dict[str, RangeState] = {}
        for block, (fixed, _), learned in zip(
            self._blocks,
            self._begun(progress.game, teacher),
            progress.finished,
            strict=True,
        ):
            quantize = jax.jit(functools.partial(_quantized_block, block))
            codes, scales, bounds = sharding.fetch(quantize(learned, fixed))
            for entry, grid, u, scale in zip(
                block.kernels, fixed.grids, codes, scales, strict=True
            ):
                zero_point = np.ravel(sharding.fetch(grid.zero_point))
                integers[entry.name] = Integers(
                    u.astype(np.uint8), np.ravel(scale), zero_point
                )
            for name, ends in zip(block.activations, bounds, strict=True):
                ranges[name] = quant.fixed_range(*ends)
        return integers, ranges

    def _replicated(self, tree: Any) -> Any:
        return sharding.replicate(tree, self._devices)

    def _end_of(self, index: int) -> int:
        """Return the step of the run at which a block is done."""
        return self._game_steps + (index + 1) * self._options.iterations

    def _split(self, images: jax.Array) -> Iterator[jax.Array]:
        """Yield the batches of all images."""
        size = self._options.batch_size
        for start in range(0, images.shape[0], size):
            yield images[start : start + size]

    def _in_batches(
        self, run: Callable[..., Any], images: jax.Array, *constants: Any
    ) -> Iterator[jax.Array]:
        """Yield the outputs of a function of a batch for all images."""
        for batch in self._split(images):
            yield run(batch, constants)

    def _joined(self, outputs: Iterator[jax.Array], count: int) -> jax.Array:
        """Put the outputs for the batches into one array, which may be gigabytes.

        Each batch is waited for, so that there is never a second copy of all.
        """
        first = next(outputs)
        whole = self._replicated(jnp.zeros((count, *first.shape[1:]), first.dtype))
        for index, output in enumerate(itertools.chain([first], outputs)):
            start = index * self._options.batch_size
            whole = _put(whole, self._replicated(output), start)
            jax.block_until_ready(whole)
        return whole

    def _error(
        self, q_outputs: Iterator[jax.Array], p_output: jax.Array, fixed: Fixed
    ) -> float:
        """Compute the error of Q's outputs, which come in batches."""
        batches = zip(q_outputs, self._split(p_output), strict=True)
        errors = [sharding.fetch(_mean_square(q, p)) for q, p in batches]
        return float(np.mean(errors) / sharding.fetch(fixed.mean_square))

    def _programs(
        self, index: int, fixed: Fixed, learned: Learned, x: jax.Array
    ) -> _Programs:
        """Return the programs of a block; they are compiled at their first use.

        Blocks share programs if the jaxprs of Q's blocks and their constants are equal.
        """
        batch = jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
        traced = jax.make_jaxpr(self._blocks[index].q_output)(learned, fixed, batch)
        alike = f"{traced.jaxpr} {list(_constants(traced))}"
        if alike not in self._known:
            self._known[alike] = self._compile(index)
        return self._known[alike]

    def _compile(self, index: int) -> _Programs:
        axis, devices = sharding.AXIS, self._devices
        block = self._block(index, axis)

        def spread(output: Callable[..., jax.Array]) -> Callable[..., Any]:
            def run(images: jax.Array, constants: Any) -> jax.Array:
                found = output(*constants, collectives.share(images, axis))
                return collectives.gather(found, axis)

            return sharding.parallel_step(run, devices, donate=False)

        @functools.cache
        def iterate(count: int) -> Callable[..., Any]:
            many = rollout.make_rollout(block.iterate, count)
            return sharding.parallel_step(many, devices)

        return _Programs(iterate, spread(block.p_output), spread(block.q_output))


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


@jax.jit
def _mean_square(x: jax.Array, other: jax.Array | float = 0.0) -> jax.Array:
    """Compute the mean of (x - other)^2 in float32."""
    gap = x.astype(jnp.float32) - jnp.asarray(other).astype(jnp.float32)
    return jnp.mean(jnp.square(gap))


def _is_closed(value: Any) -> bool:
    return hasattr(value, "consts")


def _constants(closed: Any) -> Iterator[bytes]:
    """Yield the contents of the arrays in a closed jaxpr; its text leaves them out."""
    for constant in closed.consts:
        yield np.asarray(constant).tobytes()
    for equation in closed.jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_closed):
            if _is_closed(inner):
                yield from _constants(inner)


def make_reconstruction(
    assembly: Assembly, devices: Sequence[jax.Device]
) -> Reconstruction | None:
    """Make the reconstruction of a run, or None if the run has none."""
    if not assembly.spec.reconstruction.iterations:
        return None
    return Reconstruction(assembly, devices)


def _quantized_block(block: Block, learned: Learned, fixed: Fixed) -> Any:
    """Return the codes and scales of a block's kernels, and its activation ranges."""
    codes, scales = block.codes(learned, fixed), block.scales(learned, fixed)
    return codes, scales, block.ranges(learned, fixed)
