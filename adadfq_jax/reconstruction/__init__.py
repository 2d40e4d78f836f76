"""What Q gets from images of G besides the game: reconstruction, and calibration."""

from adadfq_jax.reconstruction.block import Block as Block
from adadfq_jax.reconstruction.block import Fixed as Fixed
from adadfq_jax.reconstruction.block import Images as Images
from adadfq_jax.reconstruction.block import Learned as Learned
from adadfq_jax.reconstruction.block import Options as Options
from adadfq_jax.reconstruction.block import State as State
from adadfq_jax.reconstruction.block import start as start
