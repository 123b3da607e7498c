"""The limit on skipped updates: a run that leaves out too many ends by itself."""

import collections
from collections.abc import Mapping

from npedit_jax.training.faults import TooManySkipped


class SkipLimit:
    """Ends a run that leaves out too many updates.

    Args:
      share: of the updates of `window` steps that may be left out.
      window: steps.
      updates: how many updates each network gets in a step; one that gets none is not looked at.
      start: the step that the run begins or goes on from.
      skipped: the counts at that step, by network.
    """

    def __init__(self, share: float, window: int, updates: Mapping[str, int], start: int, skipped: Mapping[str, int]):
        self._share, self._window = share, window
        self._updates = {name: many for name, many in updates.items() if many}
        self._history = collections.deque([(start, dict(skipped))])

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the counts `skipped/NAME` as of a step.

        Raises:
          TooManySkipped: more than the share was left out within the last `window` steps, or since the last reading
            where readings lie further apart.
        """
        counts = {name: metrics[f"skipped/{name}"] for name in self._updates}
        while len(self._history) > 1 and self._history[0][0] < step - self._window:
            self._history.popleft()
        since, before = self._history[0]
        span = max(self._window, step - since)
        self._history.append((step, counts))
        for name, count in counts.items():
            skipped, allowed = count - before[name], self._share * span * self._updates[name]
            if skipped > allowed:
                raise TooManySkipped(
                    f"step {step}: {skipped:.0f} updates of {name} were left out within {span} steps, their "
                    f"gradient not finite or too large (at most {allowed:g}: config.guard.skipped_share is "
                    f"{self._share:g}). The checkpoints are from before; look at gradient_norm/{name} in "
                    "metrics.jsonl, and lower the learning rate or mend the data"
                )
