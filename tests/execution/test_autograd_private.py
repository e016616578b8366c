"""A canary: what lagless uses of torch's private autograd is where it was, or ``execution/_autograd_private`` moves."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lagless.execution import _autograd_private, after_pass, current_pass, within_another_pass

MODULE = "src/lagless/execution/_autograd_private.py"


def release():
    return ".".join(torch.__version__.split(".")[:2])


def complain(what):
    return (
        f"torch {torch.__version__}: {what}. Microbatches are told apart by it; mend {MODULE}, whose names were seen "
        f"in torch {', '.join(_autograd_private.SEEN_IN)}."
    )


def passes_of(compute):
    """What is seen at every gradient of a leaf: pass, whether it is within another, and what was called at its end."""
    leaf, seen, ended = torch.nn.Parameter(torch.ones(2, dtype=torch.float32)), [], []

    def hook(_):
        seen.append((current_pass(), within_another_pass()))
        after_pass(lambda: ended.append(len(seen)))

    leaf.register_post_accumulate_grad_hook(hook)
    compute(leaf)
    return seen, ended


def test_this_release_was_seen():
    assert release() in _autograd_private.SEEN_IN, complain("a release that nobody has looked at")


def test_passes_have_growing_numbers():
    def twice(leaf):
        leaf.sum().backward()
        leaf.sum().backward()

    (first, second), ended = passes_of(twice)
    assert current_pass() == -1, complain("there is a number outside of passes")
    assert 0 <= first[0] < second[0], complain("passes are not counted upwards")
    assert not first[1] and not second[1], complain("an outermost pass is taken for an inner one")
    assert ended == [1, 2], complain("callbacks are not called at the end of their pass")


@pytest.mark.parametrize("reentrant", [True, False])
def test_inner_passes_are_told_from_outer_ones(reentrant):
    def through_checkpoint(leaf):
        x = torch.ones(2, dtype=torch.float32, requires_grad=True)
        checkpoint(lambda y: (y * leaf).sum(), x, use_reentrant=reentrant).backward()

    seen, _ = passes_of(through_checkpoint)
    assert [inner for _, inner in seen] == [reentrant], complain("passes within passes are not recognized")
