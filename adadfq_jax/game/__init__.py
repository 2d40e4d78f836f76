"""The two-player game: its state, its step, and its collectives over devices."""

from adadfq_jax.game.players import QOptions as QOptions
from adadfq_jax.game.players import QVariables as QVariables
from adadfq_jax.game.players import Teacher as Teacher
from adadfq_jax.game.players import with_clip_ratios as with_clip_ratios
from adadfq_jax.game.step import H_QUANTILES as H_QUANTILES
from adadfq_jax.game.step import Apply as Apply
from adadfq_jax.game.step import Batch as Batch
from adadfq_jax.game.step import GameState as GameState
from adadfq_jax.game.step import Networks as Networks
from adadfq_jax.game.step import Phase as Phase
from adadfq_jax.game.step import ViewLoss as ViewLoss
from adadfq_jax.game.step import first_bad as first_bad
from adadfq_jax.game.step import init_state as init_state
from adadfq_jax.game.step import make_play as make_play
from adadfq_jax.game.step import q_variables as q_variables
from adadfq_jax.game.step import to_deploy as to_deploy
