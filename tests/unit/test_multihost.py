"""Several processes: what one decides by itself."""

import pytest

from adadfq_jax.errors import InputError
from adadfq_jax.runtime import multihost
from adadfq_jax.runtime.signals import StopRequest


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("INTERNAL: [external/gloo/x.cc:589] Gloo all-reduce: closed by peer", True),
        ("DEADLINE_EXCEEDED: barrier timed out", True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes", False),
        ("INVALID_ARGUMENT: shapes differ", False),
        ("shapes (1,) and (2,) differ", False),
    ],
)
def test_which_errors_say_that_another_process_is_gone(error, lost):
    assert bool(multihost._DISCONNECT_ERRORS.match(error)) == lost


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("here", 2, 0), "HOST:PORT"),
        (("host:9", 2, None), "--process_id"),
        (("host:9", None, 0), "--processes"),
        (("host:9", 2, 2), "--process_id=2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        multihost.start(*arguments)


def test_one_process_acts_by_itself():
    assert multihost.from_first(lambda: 3) == multihost.together(lambda: 3) == 3
    assert multihost.largest(5) == 5
    with pytest.raises(ZeroDivisionError):
        multihost.together(lambda: 1 // 0)


def test_a_stop_counts_at_once_in_one_process_and_once_agreed_on_in_several():
    alone, shared = StopRequest(), StopRequest()
    alone.hear(15)
    assert alone and alone.exit_code == 75
    shared.agree(lambda number: number)
    shared.hear(15)
    assert not shared
    shared.agree(lambda number: max(number, 2))
    assert shared and shared.exit_code == 75
    deaf = StopRequest()
    deaf.agree(lambda number: max(number, 2))  # another process was asked
    assert deaf and deaf.exit_code == 130
