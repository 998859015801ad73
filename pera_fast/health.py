"""Signs of a run that goes wrong without failing: collapse and spikes, from what is recorded anyway."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from pera_fast import reference

_RECORDS = 20  # of which a spike is told
_EVEN, _ONE, _EQUAL = 0.98, 0.05, 0.05  # shares of what the quantity can be at most


def assignment_health(
    z_student: Tensor, z_teacher: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor],
    centre: Tensor, student_temperature: float, teacher_temperature: Tensor,
) -> dict[str, float]:  # fmt: skip
    """How images are assigned to prototypes, from a few of them: z [n, d] unit rows of n different images,
    student and teacher their prototypes (v [K, d], g [K, 1]).

    teacher_entropy: of an image's assignment, on average, in nats; log K when it says nothing. prototype_entropy: of
    all images' mean assignment; 0 when all go to one prototype. kl: from teacher to student, what the loss can
    still gain. feature_std: √(mean ‖z - mean z‖²) of the teacher's rows, from 0, all equal, to 1.
    """
    logits = (reference.prototype_logits(z_teacher, *teacher).float() - centre) / teacher_temperature
    log_p = logits.log_softmax(1)
    log_q = (reference.prototype_logits(z_student, *student).float() / student_temperature).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    values = torch.stack(
        (
            -(p * log_p).sum(1).mean(),
            -torch.xlogy(mean, mean).sum(),
            (p * (log_p - log_q)).sum(1).mean(),
            (z_teacher - z_teacher.mean(0)).square().sum(1).mean().sqrt(),
        )
    )
    names = ("teacher_entropy", "prototype_entropy", "kl", "feature_std")
    return dict(zip(names, values.tolist(), strict=True))


class Watch:
    """Says what a record looks like, each trouble once until it is over."""

    def __init__(self, num_prototypes: int) -> None:
        self._most = math.log(num_prototypes)
        self._losses: deque[float] = deque(maxlen=_RECORDS)
        self._said: set[str] = set()

    def look(self, record: dict[str, float]) -> list[str]:
        """Sentences for the user about a record with `assignment_health`'s values, step, loss, grad_norm."""
        loss, most = record["loss"], self._most
        usual = statistics.median(self._losses) if len(self._losses) == _RECORDS else math.inf
        spread = statistics.median(abs(x - usual) for x in self._losses) if math.isfinite(usual) else 0.0
        if math.isfinite(loss):
            self._losses.append(loss)
        troubles = {
            "equal": record["feature_std"] < _EQUAL,
            "one": record["feature_std"] >= _EQUAL and record["prototype_entropy"] < _ONE * most,
            "even": record["teacher_entropy"] > _EVEN * most,
            "spike": loss > usual + max(10 * spread, 0.2 * abs(usual)),
        }
        sentences = {
            "equal": "the teacher's features of different images are nearly equal (feature_std "
            f"{record['feature_std']:.3f} of 1): it has collapsed. Likely causes: a learning rate too high for the "
            "batch, a teacher that follows too fast (lower 1 - momentum), images that are nearly equal",
            "one": "nearly all images go to the same prototypes (prototype_entropy "
            f"{record['prototype_entropy']:.2f} of at most {most:.2f}): it is collapsing. Likely causes: a centre "
            "that follows too slowly (lower --centre-momentum), a teacher temperature too low",
            "even": f"the teacher spreads each image evenly over all prototypes (teacher_entropy "
            f"{record['teacher_entropy']:.2f} of at most {most:.2f}), which teaches nothing. Likely causes: a teacher "
            "temperature too high, a learning rate too high",
            "spike": f"the loss is {loss:.3f}, {usual:.3f} being usual, with a gradient norm of "
            f"{record['grad_norm']:.3g}. Likely causes: a learning rate too high, a damaged image; a single "
            "spike does no harm, the gradient being clipped",
        }
        new = [f"step {record['step']}: {sentences[name]}" for name, is_so in troubles.items()
               if is_so and name not in self._said]  # fmt: skip
        self._said = {name for name, is_so in troubles.items() if is_so}
        return new
