"""Any JAX network as a graph of what can be quantized, which its jaxpr shows."""

from adadfq_jax.network.graph import Activation as Activation
from adadfq_jax.network.graph import BatchNorm as BatchNorm
from adadfq_jax.network.graph import Block as Block
from adadfq_jax.network.graph import Graph as Graph
from adadfq_jax.network.graph import Kernel as Kernel
from adadfq_jax.network.graph import Product as Product
from adadfq_jax.network.run import Hooks as Hooks
from adadfq_jax.network.run import block_variables as block_variables
from adadfq_jax.network.run import kernels as kernels
from adadfq_jax.network.run import named as named
from adadfq_jax.network.run import run as run
from adadfq_jax.network.run import run_block as run_block
from adadfq_jax.network.run import statistics as statistics
from adadfq_jax.network.shifts import Shift as Shift
from adadfq_jax.network.shifts import find_shifts as find_shifts
from adadfq_jax.network.sources import Function as Function
from adadfq_jax.network.sources import as_function as as_function
from adadfq_jax.network.sources import tree_of as tree_of
from adadfq_jax.network.trace import PLACES as PLACES
from adadfq_jax.network.trace import trace as trace
