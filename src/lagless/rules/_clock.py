"""The clock of averages: which optimizer steps update, and what a read at any step is.

Streaming, optimizers, stored checkpoints and theory all ask here, so they cannot disagree. It answers three questions:

- ``UpdateSchedule.advance`` and ``events`` walk along a run, which may see every step or irregular ones;
- ``UpdateSchedule.last`` and ``tick_at`` jump to any step of a run that sees every step, and ``tick_at`` takes a tensor
  of steps as well;
- ``read_after`` gives the coefficients of a read at any step, update or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lagless.rules._rule import ReadCoefficients, Rule, UpdateCoefficients


class Tick(NamedTuple):
    """One update, as a rule sees it.

    Attributes:
        step: t, the optimizer step of this update (1-based).
        previous: the step of the update before it; the end of burn-in for the first one.
        number: k, how many updates there are up to and including this one.
    """

    step: int
    previous: int
    number: int

    def following(self, step: int) -> Tick:
        """Return the update after this one, made at ``step``."""
        return Tick(step, self.step if self.number else self.previous, self.number + 1)


class Event(NamedTuple):
    """What happens to the buffers of an average at one step.

    Attributes:
        step: t.
        follows: whether the buffers are set to the live weights.
        last: the latest update up to and including this step; its number is 0 before the first one.
    """

    step: int
    follows: bool
    last: Tick

    @property
    def updates(self) -> bool:
        """Whether this step is an update; where it neither updates nor follows, the average rests."""
        return self.last.number > 0 and self.last.step == self.step


@dataclass(frozen=True)
class UpdateSchedule:
    """When buffers follow the live weights, when they are updated, when they rest.

    Attributes:
        update_after: τ, burn-in in optimizer steps.
        update_freq: φ, optimizer steps from one update to the next.
        hold: during burn-in keep θ_0 and refresh it once, at t = τ, instead of following the live weights.
    """

    update_after: int
    update_freq: int
    hold: bool = False

    def follows(self, step: int) -> bool:
        """Whether buffers are set to the live weights at ``step``: t ≤ τ (t = τ only, with ``hold``)."""
        return step == self.update_after if self.hold else step <= self.update_after

    def updates(self, step: int) -> bool:
        """Whether ``step`` is an update: t > τ and (t - τ) mod φ = 0."""
        # `&` and not `and`: an optimizer captured in a graph asks with a tensor of steps.
        return (step > self.update_after) & ((step - self.update_after) % self.update_freq == 0)

    def changes(self, step: int) -> bool:
        """Whether an average that sees every step must change its buffers at ``step``.

        They follow the weights through burn-in, and can be read only later: its last step is enough.
        """
        return (step == self.update_after) | self.updates(step)

    def count(self, step: int) -> int:
        """Return how many updates there are up to and including ``step`` in a run that sees every step."""
        return at_least(step - self.update_after, 0) // self.update_freq

    def update_steps(self, last: int) -> range:
        """Return the steps of all updates up to and including ``last``."""
        return range(self.update_after + self.update_freq, last + 1, self.update_freq)

    def begin(self, start: int = 0) -> Tick:
        """Return the state of the clock before the first update of a run whose first weights are those of ``start``."""
        return Tick(start, max(start, self.update_after), 0)

    def advance(self, last: Tick, step: int) -> Event:
        """Return what happens at ``step``, the next one that the run sees, where ``last`` is the latest update."""
        return Event(step, self.follows(step), last.following(step) if self.updates(step) else last)

    def events(self, steps: Sequence[int]) -> Iterator[Event]:
        """Return what happens at each of ``steps[1:]``; ``steps[0]`` is θ_0's own. Steps may be spaced irregularly."""
        last = self.begin(steps[0])
        for step in steps[1:]:
            event = self.advance(last, step)
            last = event.last
            yield event

    def tick_at(self, step: int, start: int = 0) -> Tick:
        """Return the update at ``step`` after burn-in; between updates, the further one that a read there counts in.

        Args:
            step: t > max(``start``, τ), or a tensor of such steps, for a tick of tensors.
            start: the step of the first weights. The run sees every step from there on.
        """
        before = self.count(step - 1)
        previous = at_least(self.update_after + before * self.update_freq, start)
        return Tick(step, previous, before - self.count(start) + 1)

    def last(self, step: int, start: int = 0) -> Tick:
        """Return the latest update at ``step``; number 0 if there was none since ``start``. Every step is seen."""
        passed = self.count(step)
        if passed <= self.count(start):
            return self.begin(start)
        return self.tick_at(self.update_after + passed * self.update_freq, start)


def ticks(rule: Rule, steps: Sequence[int]) -> Iterator[Tick]:
    """Return the updates that ``rule`` makes at the given steps; ``steps[0]`` is θ_0's own."""
    return (event.last for event in rule.schedule.events(steps) if event.updates)


def read_between_updates(update: UpdateCoefficients, read: ReadCoefficients) -> ReadCoefficients:
    """Return the coefficients of ``read`` after one more ``update``, in terms of the buffers before it.

    c ← cM, d ← d + c·v.
    """
    size = range(len(read.buffers))
    buffers = tuple(sum(read.buffers[i] * update.matrix[i][j] for i in size) for j in size)
    return read._replace(buffers=buffers, live=read.live + sum(read.buffers[i] * update.live[i] for i in size))


def read_after(rule: Rule, last: Tick, step: int) -> ReadCoefficients | None:
    """Return the coefficients c and d of a read at ``step``, in terms of the buffers as the update ``last`` left them.

    On an update step that is the rule's own read. Off one it counts the iterate of ``step`` in: its value is that of
    one further update there.

    Args:
        rule: the averaging rule.
        last: the latest update up to and including ``step``.
        step: where the average is read, after burn-in.

    Returns:
        The coefficients; None before the first update.
    """
    if last.number == 0:
        return None
    if last.step == step:
        return rule.read(last)
    further = last.following(step)
    return read_between_updates(rule.update(further), rule.read(further))


def at_least(value: Any, bound: float) -> Any:
    """Return max(value, bound), of a number or of each element of a tensor."""
    # A tick of tensors, which an optimizer captured in a graph has, must not turn into a Python number.
    return value.clamp(min=bound) if hasattr(value, "clamp") else max(value, bound)
