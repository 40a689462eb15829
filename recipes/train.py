"""Turn an autoregressive model into a parallel draft model.

python recipes/train.py experiment=qwen2.5-0.5b data.source=answers.jsonl output_dir=outputs/my-draft
torchrun --nproc_per_node 8 recipes/train.py experiment=qwen2.5-0.5b deepspeed=zero1 ...
deepspeed --no_local_rank --num_gpus 8 recipes/train.py experiment=qwen2.5-0.5b deepspeed=zero1 ...
"""

from __future__ import annotations

from shlex import quote

from pard_train.commands import command
from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_train


def run(config: Config) -> None:
    """Train, and print the next command."""
    from pard_train.device import this_process
    from pard_train.evaluation.monitor import build_monitor
    from pard_train.reports.webpage import PAGE_FILE
    from pard_train.training.plan import plan_run
    from pard_train.training.trainer import train

    if config.plan_only:
        print(plan_run(config).render())
        return
    draft = train(config, build_monitor(config))
    if this_process().is_main_process:
        run_folder = draft.parent
        print(f"draft model: {draft}\nreport: {run_folder / PAGE_FILE}")
        targets = f" targets=[{','.join(config.targets)}]" if config.targets else ""
        paths = quote(f"draft.path={run_folder}"), quote(f"output_dir={run_folder}/export")
        print(f"next: {command('export')} {paths[0]}{targets} {paths[1]}")


if __name__ == "__main__":
    hydra_program("train", validate_train, run)
