"""P's files: read them without running code, recognise the network, translate names."""

from adadfq_jax.teacher.loading import defect_of as defect_of
from adadfq_jax.teacher.loading import from_state_dict as from_state_dict
from adadfq_jax.teacher.loading import load as load
from adadfq_jax.teacher.loading import note_on as note_on
from adadfq_jax.teacher.loading import read as read
from adadfq_jax.teacher.loading import recognise as recognise
from adadfq_jax.teacher.loading import save as save
from adadfq_jax.teacher.loading import to_state_dict as to_state_dict
from adadfq_jax.teacher.loading import torch_name as torch_name
from adadfq_jax.teacher.naming import schemes as schemes
from adadfq_jax.teacher.network import LoadedNetwork as LoadedNetwork
from adadfq_jax.teacher.network import load_network as load_network
from adadfq_jax.teacher.network import package_function as package_function
