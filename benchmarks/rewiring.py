"""Masks that move: what it adds to a step."""

from collections.abc import Iterator

from benchmarks.measure import Variant, in_turn
from benchmarks.subjects import Setting, parts, trainer
from benchmarks.table import Row
from benchmarks.training import TINY, WHOLE, random_mask
from pai_bench.assembly import moving_mask

_EVERY = 2  # steps between two rewires here, so that an epoch has several
_PAPER = 100  # steps between two rewires in the papers
_RULES = ("set", "rigl", "snfs")
_EACH_STEP = ("snfs",)  # looks at the gradients of all weights in every step


def rewiring(setting: Setting) -> Iterator[Row]:
    """Whole epochs of training with a mask that moves, against one that does not, as if it moved every 100 steps."""
    for net in ("resnet20",) if setting.quick else ("lenet300", "resnet20"):
        batch = 32 if setting.quick else 128
        num_steps = 4 if setting.quick else 10
        small = TINY.get(net, ()) if setting.quick else ()
        settings = ("pruner=random", "sparsity=0.9", f"model={net}", f"training.batch_size={batch}", *WHOLE, *small)

        def epochs(
            rule: str, *moves: str, num_train: int = batch * num_steps, settings: tuple[str, ...] = settings
        ) -> Variant:
            of = parts(setting.device, *settings, f"rewire={rule}", *moves, num_train=num_train)
            training, mask = trainer(of), random_mask(of, 0.1)
            if moves:
                training.move_mask(moving_mask(of, training, mask, {}))

            def epoch() -> float:
                before = training.seconds
                training.until(mask, round(training.epoch) + 1)
                return training.seconds - before

            return epoch

        often = f"rewire.every_steps={_EVERY}"
        seldom = ("rewire.begin=null", f"rewire.every_steps={9 * num_steps}")  # none is due while we look
        variants = {"none": epochs("none")}
        variants |= {rule: epochs(rule, often) for rule in _RULES}
        variants |= {f"{rule}, none due": epochs(rule, *seldom) for rule in _EACH_STEP}
        times = in_turn(variants, 1 if setting.quick else 3)
        still = times.seconds("none") / num_steps
        for rule in _RULES:
            waiting = times.seconds(f"{rule}, none due" if rule in _EACH_STEP else "none")
            step, added = waiting / num_steps, (times.seconds(rule) - waiting) / (num_steps // _EVERY)
            yield Row(
                f"step of {net} with rewire={rule} every {_PAPER} steps, over a fixed mask",
                (step + added / _PAPER) / still,
                target=None if rule in _EACH_STEP else 1.1,
                at_most=True,
                time=step + added / _PAPER,
                note=f"a step takes {1e3 * step:.3g} ms, and {1e3 * still:.3g} ms with a fixed mask; a rewire "
                f"{1e3 * added:.3g} ms more",
            )
