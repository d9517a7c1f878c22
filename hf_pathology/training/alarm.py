"""Words for what the numbers of a run say is going wrong, and what to do about it."""

from typing import Any


IN_A_ROW = 3  # panels that must say the same: one batch says little
SMALL_STEP, HIGH_RATE = (
    1024,
    2e-3,
)  # tiles of a step; the published rates above the second are for steps from the first on


class Alarm:
    """Looks at the records of a run and says of each kind of trouble, once, what it is and what to do.

    The signs, in `IN_A_ROW` panels in a row:

    - uniform collapse: the teacher's entropy is within 0.1 % of ln K, and the student says the same (KL below 0.01 nats).
      A teacher of many prototypes whose training is young is within 1 %, with a KL of 0.05, and in good order;
    - one-hot collapse: the teacher's entropy is below a tenth of ln K, and nearly all views share a few prototypes (the
      share of prototypes in use is at most 1/8), where that share is not told, below a fiftieth of ln K;
    - equal features: their standard deviation is below 1 % of what it is when they fill the sphere;
    - one dimension: the features' effective rank is below 2.

    An untrained encoder may show one of the signs, for one or two panels.

    Args:
        optimizer: of the run; with `adamw` a learning rate above HIGH_RATE is too high for steps of fewer tiles than
            SMALL_STEP, whatever the panels say.
    """

    def __init__(self, optimizer: str):
        self.optimizer = optimizer
        self._times: dict[str, int] = {}
        self._told: set[str] = set()

    def look(self, record: dict[str, Any]) -> str:
        """The alarms that this record raises for the first time, in words; empty when there are none."""
        told = []
        for kind, (is_seen, needed, words) in self._signs(record).items():
            self._times[kind] = self._times.get(kind, 0) + 1 if is_seen else 0
            if self._times[kind] >= needed and kind not in self._told:
                self._told.add(kind)
                told.append(f"{kind}: {words}")
        return "; ".join(told)

    def _signs(self, record: dict[str, Any]) -> dict[str, tuple[bool, int, str]]:
        """Of each kind that this record can tell: whether its sign is there, in how many records it must be, and the words."""
        signs = {}
        rate, tiles = record.get("learning_rate", 0.0), record.get("images", 0) / (record.get("step", 0) + 1)
        signs["learning rate"] = (
            self.optimizer == "adamw" and rate > HIGH_RATE and tiles < SMALL_STEP,
            1,
            f"{rate:.2g} is above {HIGH_RATE:g}, where AdamW with steps of only {tiles:.0f} tiles has ended in collapse or "
            "NaN; what to do: lower --learning_rate, which is multiplied by the batch (see batch_scaling)",
        )
        if "teacher_entropy" in record and "uniform_entropy" in record:
            entropy, most = record["teacher_entropy"], record["uniform_entropy"]
            share = entropy / most if most > 0 else 0.0
            signs["uniform collapse"] = (
                share > 0.999 and record.get("kl", 0.0) < 0.01,
                IN_A_ROW,
                f"the teacher's entropy, {entropy:.3f}, has been within 0.1 % of ln K, {most:.3f}, for {IN_A_ROW} panels: it "
                "says the same of every tile; what to do: sharpen the teacher (a lower --teacher_temperature), lower "
                "--learning_rate, or begin again with a larger batch",
            )
            usage = record.get("prototype_usage")
            signs["one-hot collapse"] = (
                share < 0.1 and usage <= 1 / 8 if usage is not None else share < 0.02,
                IN_A_ROW,
                f"the teacher's entropy, {entropy:.3f}, has been far below ln K, {most:.3f}, for {IN_A_ROW} panels, and "
                "few prototypes are left: nearly all tiles are told the same one; what to do: let the centre follow "
                "(--center_momentum 0.9), raise --teacher_temperature, lower --learning_rate, look whether the tiles differ",
            )
        if "feature_std" in record:
            signs["equal features"] = (
                record["feature_std"] < 0.01,
                IN_A_ROW,
                f"the features' standard deviation has been {record['feature_std']:.2g} for {IN_A_ROW} panels, 1 would fill "
                "the sphere: all tiles get the same feature; what to do: lower --learning_rate, or begin again",
            )
        if "effective_rank" in record:
            signs["one dimension"] = (
                record["effective_rank"] < 2.0,
                IN_A_ROW,
                f"the features' effective rank has been {record['effective_rank']:.2g} for {IN_A_ROW} panels: they differ in "
                "one direction only; what to do: lower --learning_rate, or begin again",
            )
        return signs
