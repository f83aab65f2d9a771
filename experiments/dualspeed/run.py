"""Train the arms of the DualSpeed experiment and keep their records.

    python experiments/dualspeed/run.py --task scenes --seeds 0 1 2
    python experiments/dualspeed/run.py --task nlvr --data ../shared/data --arms full pruned dualspeed --seeds 0

Arms that have a record are not trained again, interrupted ones go on. Two processes may work on different seeds or
tasks at the same time; give each one thread. Weights are not kept, but for the common start in runs/ (not in git);
--keep-models keeps them there, too, for experiments on the checkpoints.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
PLAN = (
    "full", "pruned", "dualspeed", "dualspeed_no_isolator", "dualspeed_no_kl", "dualspeed_random", "full_equal_time",
    "dualspeed_slow_0", "dualspeed_slow_5", "dualspeed_slow_20", "dualspeed_slow_30", "dualspeed_keep_5",
    "dualspeed_keep_20", "dualspeed_keep_40", "dualspeed_annealed", "dualspeed_annealed_20",
    "dualspeed_annealed_15_no_kl", "dualspeed_original", "full_packed", "dualspeed_sample", "dualspeed_packed",
    "full_packed_equal_time", "dualspeed_packed_slow_5", "dualspeed_random_keep", "dualspeed_random_keep_5",
    "dualspeed_content_keep", "dualspeed_two_way", "mixed",
)  # fmt: skip
"""The arms A to I of the plan, and the mix without isolator and KL."""


def main() -> None:
    """Read the command line and run every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="scenes, easy_vqa or nlvr")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(PLAN), help="names of arms; the default is the whole plan")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data", help="the public sets")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where records go")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "runs", help="where weights live meanwhile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="steps other than the task's")
    parser.add_argument("--learning-rate", type=float, default=None, help="learning rate other than the task's")
    parser.add_argument("--layers", type=int, default=None, help="layers of the language model other than the task's")
    parser.add_argument("--keep-models", action="store_true", help="keep the weights of the arms, too")
    arguments = parser.parse_args()

    import torch

    from trimtab.quickstart.arms import arm_of
    from trimtab.quickstart.run import StepFigures, run_arms, show_progress
    from trimtab.quickstart.tasks import open_task

    torch.set_num_threads(arguments.threads)
    arms = [arm_of(name) for name in arguments.arms]
    for seed in arguments.seeds:
        task = open_task(arguments.task, arguments.data, seed)
        if arguments.learning_rate is not None:
            task = replace(task, learning_rate=arguments.learning_rate)
        if arguments.layers is not None:
            task = replace(task, sizes=replace(task.sizes, layers=arguments.layers))
        root = arguments.work / arguments.task / f"seed-{seed}"
        target = arguments.records / arguments.task / f"seed-{seed}"
        target.mkdir(parents=True, exist_ok=True)
        with show_progress() as progress:
            run_arms(
                task, arms, seed, root, progress, steps=arguments.steps, keep_models=arguments.keep_models,
                records_folder=target, told=StepFigures(progress),
            )  # fmt: skip


if __name__ == "__main__":
    main()
