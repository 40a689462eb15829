"""A real training run within a time: a model's own answers, training with a learning curve, acceptance and speed.

    python benchmarks/gpu_run.py --seconds 540 --output outputs/gpu/real
    python benchmarks/gpu_run.py --seconds 300 --output outputs/gpu/real --live   # then: speed-up by K of its draft

SmolLM2-135M is target and draft. It answers as many prompts, in batches, as a share of the time allows: those of
HumanEval, GSM8K and MT-bench that are not held out, then coding problems of reasoning-gym. Every step is a program of
the project, and the same command resumes. Training that takes longer than its share is cut; the best draft so far is
then evaluated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pages import command, markdown, origin, write_page

from pard_train.data.sources import CODEIO, read_packaged_rows
from pard_train.reports.records import read_result
from pard_train.runs import new_file, read_json

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("humaneval", "gsm8k", "mt_bench")
QUESTIONS = (  # asked about every coding problem
    "Write a Python function `main_solution` that does the following.\n\n{task_description}\n\n{input_output_spec}",
    "Explain step by step what this Python code does.\n\n```python\n{code_sample}\n```",
)
ANSWERS_SHARE, TRAINING_SHARE = 0.35, 0.8  # of the time, by when answers and training end
SECONDS_TO_START = 30  # of a program
SLOTS_PER_TOKEN = 3.37  # of an answer, at K 8 and the default COD
WARM_UP_LOGS = 2  # of training, in which compilation happens


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        num_code: coding problems.
        num_pilot: prompts that are answered first, to measure the speed.
        num_points: of the learning curve.
        live_k: values of K for live decoding.
        answers, training, evaluation: settings of these programs.
    """

    num_code: int
    num_pilot: int
    num_points: int
    live_k: tuple[int, ...]
    answers: str
    training: str
    evaluation: str


FULL = Size(
    num_code=3002,
    num_pilot=512,
    num_points=12,
    live_k=(8, 4, 2),
    answers="inference.batch_size=256 regenerate.max_new_tokens=256",
    training="cod=pard data.max_length=1024 data.overlong=drop data.slot_budget=16384 inference.batch_size=64 "
    "monitor.max_new_tokens=128 monitor.max_prompts=24 trainer.dataloader_num_workers=2 trainer.logging_steps=10 "
    "trainer.num_train_epochs=4 trainer.save_steps=200 trainer.torch_compile=true trainer.warmup_steps=20",
    evaluation="inference.batch_size=64 evaluate.max_new_tokens=128 evaluate.max_prompts=24 evaluate.live_prompts=4 "
    "evaluate.live_rounds=2 evaluate.live_compiled=true",
)
TINY = Size(
    num_code=1,
    num_pilot=2,
    num_points=2,
    live_k=(2,),
    answers="inference.batch_size=2 regenerate.max_new_tokens=4",
    training="cod=pard data.slot_budget=1300 monitor.max_new_tokens=2 monitor.max_prompts=1 trainer.logging_steps=1 "
    "trainer.max_steps=2 trainer.num_train_epochs=2 trainer.save_steps=1",
    evaluation="evaluate.max_new_tokens=2 evaluate.max_prompts=1 evaluate.live_prompts=1",
)


class Run:
    """One run in a folder, with a deadline."""

    def __init__(self, folder: Path, seconds: float, size: Size):
        self.folder, self.seconds, self.size = folder, seconds, size
        self.started, self.train = time.monotonic(), folder / "train"
        files = [str(folder / "prompts" / "held_out" / f"{name}.jsonl") for name in BENCHMARKS]
        self.held_out = f"evaluate.benchmarks=[{','.join(files)}]"

    @property
    def draft(self) -> Path:
        """The training run if it has ended, else its best draft so far, which may not exist."""
        return self.train if (self.train / "draft").is_dir() else self.train / "best"

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the time has passed."""
        return self.started + share * self.seconds - time.monotonic()

    def program(self, name: str, output: Path, *settings: str, share: float = 1.0) -> bool:
        """Run a program of the project; if it fails, so does this one. Returns whether it ended within the time."""
        line = [sys.executable, name, "experiment=quickstart", f"output_dir={output}", *settings]
        print(f"\n[{self.seconds - self.left():.0f} s] {' '.join(line[1:])}", flush=True)
        try:
            status = subprocess.run(line, cwd=ROOT, timeout=max(1.0, self.left(share))).returncode
        except subprocess.TimeoutExpired:
            print(f"[{self.seconds - self.left():.0f} s] {name} was cut", flush=True)
            return False
        return not status or sys.exit(f"{name} failed with exit status {status}")

    def write_prompts(self) -> list[str]:
        """Training prompts as JSONL lines, those of the benchmarks first."""
        code = self.folder / "code.jsonl"
        rows = read_packaged_rows(CODEIO)[: self.size.num_code]
        texts = [question.format_map(row) for question in QUESTIONS for row in rows]
        write_lines(code, [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts])
        if not self.program("data_scripts/prepare.py", self.folder, f"sources.code.path={code}"):
            sys.exit("the prompts were cut: the same command continues")
        lines = (self.folder / "prompts" / "train.jsonl").read_text().splitlines()
        return sorted(lines, key=lambda line: json.loads(line)["source"] == "code")

    def write_answers(self, prompts: Sequence[str]) -> None:
        """Answer some prompts, then as many as the speed of these allows."""
        chosen = self.folder / "chosen.jsonl"
        if not chosen.exists():
            counts = self._answer(prompts[: self.size.num_pilot], self.folder / "pilot.jsonl")
            answers_per_second = counts["answers"] * counts["tokens_per_second"] / max(1, counts["new_tokens"])
            number = int(max(0.0, self.left(ANSWERS_SHARE) - SECONDS_TO_START) * answers_per_second)
            print(f"{answers_per_second:.1f} answers/s: time for {number:,} more", flush=True)
            write_lines(chosen, prompts[: self.size.num_pilot + number])
        self._answer(chosen.read_text().splitlines(), chosen)

    def _answer(self, prompts: Sequence[str], file: Path) -> dict[str, float]:
        """Answer prompts, unless that is done. Returns the counts of the manifest."""
        manifest, settings = self.folder / "answers" / "manifest.json", self.size.answers.split()
        if not manifest.exists() or read_json(manifest)["counts"]["rows"] != len(prompts):
            write_lines(file, prompts)
            if not self.program(
                "data_scripts/regenerate.py", self.folder, *settings, f"regenerate.prompts={file}", share=TRAINING_SHARE
            ):
                sys.exit("the answers were cut: the same command continues")
        return read_json(manifest)["counts"]

    def answered(self) -> tuple[int, int]:
        """Prompt tokens and answer tokens of the training data."""
        lines = (self.folder / "answers" / "answers.jsonl").read_text().splitlines()
        turns = [turn for line in lines for turn in json.loads(line)["token_ids"]["turns"]]
        return sum(len(prompt) for prompt, _ in turns), sum(len(answer) for _, answer in turns)

    def train_draft(self) -> None:
        """Train with some measurements of tau, from where an earlier call was cut."""
        if (self.train / "draft").is_dir():
            return
        settings = dict(setting.split("=") for setting in self.size.training.split())
        num_prompt, num_answer = self.answered()
        num_slots = int(settings["trainer.num_train_epochs"]) * (num_prompt + SLOTS_PER_TOKEN * num_answer)
        num_steps = num_slots / int(settings["data.slot_budget"])
        self.program(
            "recipes/train.py",
            self.train,
            *self.size.training.split(),
            f"data.source={self.folder / 'answers' / 'answers.jsonl'}",
            f"monitor.every_steps={max(1, round(num_steps / self.size.num_points))}",
            f"resume={str(self.train.is_dir()).lower()}",
            self.held_out,
            share=TRAINING_SHARE,
        )

    def make_draft(self) -> None:
        """Prompts, answers, training, evaluation; a report after the last two."""
        self.write_answers(self.write_prompts())
        self.train_draft()
        self.report()
        self.evaluate("evaluation", "live_prompts=0")
        self.report()
        if not self.draft.is_dir():
            sys.exit("training was cut before it had a draft: the same command continues")

    def evaluate(self, name: str, *settings: str) -> Path | None:
        """Evaluate the draft. Returns the folder of the result, or None if there is no draft or no time."""
        output = self.folder / f"{name}-{self.draft.name}"
        if not self.draft.is_dir() or self.left() < SECONDS_TO_START / 2:
            return None
        line = (*self.size.evaluation.split(), self.held_out, f"draft.path={self.draft}", *settings)
        return output if self.program("recipes/evaluate.py", output, *line) else None

    def decode_live(self) -> None:
        """Speed-up at several K, predicted and measured, while there is time."""
        rows: list[dict[str, float]] = []
        for k in self.size.live_k:
            output = self.evaluate(f"live-{k}", f"num_draft_tokens=[{k}]", f"live_num_draft_tokens={k}")
            if output is None:
                sys.exit(f"no draft, or no time for K {k}: the same command continues")
            rows.append(speedups(output))
            best = {f"{how}_best_k": max(rows, key=lambda row: row[how])["k"] for how in ("predicted", "measured")}
            table = [list(rows[0]), *([f"{value:.3g}" for value in row.values()] for row in rows)]
            page = ["# Speed-up by K, batch 1", "", f"{origin()}.", "", f"    {command()}", "", markdown(table), ""]
            write_page("best-k", "\n".join(page), {**best, "rows": rows})

    def report(self) -> None:
        """Write the page and the figures so far."""
        metrics, (num_prompt, num_answer) = read_metrics(self.train / "metrics.jsonl"), self.answered()
        points = learning_curve(metrics)
        taus = {"tau_first": points[0]["mean"], "tau_best": max(p["mean"] for p in points)} if points else {}
        figures = {**totals_of(metrics), **taus, "distinct_tokens": num_answer, "curve_points": len(points)}
        names = ["mean", *BENCHMARKS]
        rows = [[f"{point['supervised_tokens']:,.0f}", *(f"{point[name]:.3f}" for name in names)] for point in points]
        lines = [
            "# A real run",
            "",
            f"SmolLM2-135M-Instruct as its own target; {origin()}. {num_answer:,} answer tokens after {num_prompt:,} "
            f"prompt tokens; trained on {figures.get('supervised_tokens', 0):,.0f} supervised tokens in all."
            + ("" if self.draft == self.train else " Training was cut: the draft is its best so far."),
            "",
            f"    {command()}",
            "",
            "## Learning curve: tau on held-out prompts",
            "",
            markdown([["supervised tokens", *names], *rows], is_shown=False),
            "",
        ]
        lines += [file.read_text() for file in self.folder.glob(f"evaluation-{self.draft.name}/report.md")]
        write_page("real-run", "\n".join(lines), {**figures, "curve": points})


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a JSONL file atomically."""
    with new_file(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Complete lines of a metrics file; none if it does not exist."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def tokens_by_step(metrics: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    """Logged steps, and the supervised tokens up to each.

    >>> rates = {"throughput/seconds_per_step": 0.5, "throughput/supervised_tokens_per_second": 100.0}
    >>> tokens_by_step([{"step": 10, "loss": 1.0, **rates}])
    ([0.0, 10], [0.0, 500.0])
    """
    steps, tokens = [0.0], [0.0]
    for row in metrics:
        if "loss" in row:
            seconds = row["throughput/seconds_per_step"] * (row["step"] - steps[-1])
            steps.append(row["step"])
            tokens.append(tokens[-1] + row["throughput/supervised_tokens_per_second"] * seconds)
    return steps, tokens


def learning_curve(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Supervised tokens, tau of every benchmark and their mean, at every measured step."""
    steps, tokens = tokens_by_step(metrics)
    return [
        {
            "supervised_tokens": float(np.interp(row["step"], steps, tokens)),
            **{name.rsplit("/", 1)[1]: tau for name, tau in row.items() if name.startswith("eval/tau/")},
        }
        for row in metrics
        if "eval/tau/mean" in row
    ]


def totals_of(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Supervised tokens, median speeds, and compilations after the first logs."""
    logs = [row for row in metrics if "loss" in row]
    if not logs:
        return {}
    totals = {"supervised_tokens": tokens_by_step(metrics)[1][-1]}
    for name in ("supervised_tokens_per_second", "mfu", "peak_memory_gb", "data_wait_share"):
        if values := [row[f"throughput/{name}"] for row in logs if f"throughput/{name}" in row]:
            totals[name] = float(np.median(values))
    if any("throughput/compilations" in row for row in logs):
        totals["compilations"] = sum(row.get("throughput/compilations", 0) for row in logs[WARM_UP_LOGS:])
    return totals


def speedups(evaluation: Path) -> dict[str, float]:
    """Speed-up over plain decoding at the one K of an evaluation: predicted, and the mean of what was measured."""
    records = [record for record in read_result(evaluation)["records"] if record["mode"] == "live"]
    (prediction,) = read_json(evaluation / "predictions.json")[0]["rows"]
    measured = float(np.mean([record["speed"]["speedup"] for record in records]))
    return {"k": prediction["num_draft_tokens"], "predicted": prediction["speedup"], "measured": measured}


def main() -> None:
    """Run every step within the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--output", type=Path, required=True, help="folder of prompts, answers, run and evaluation")
    parser.add_argument("--live", action="store_true", help="only decode live with the draft of the run in the folder")
    parser.add_argument("--rehearse", action="store_true", help="a few prompts and two steps")
    arguments = parser.parse_args()
    run = Run(arguments.output.resolve(), arguments.seconds, TINY if arguments.rehearse else FULL)
    run.folder.mkdir(parents=True, exist_ok=True)
    if arguments.live:
        run.decode_live()
    else:
        run.make_draft()


if __name__ == "__main__":
    main()
