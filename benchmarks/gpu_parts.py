"""Parts of benchmarks/gpu.py, and the goals of their figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_needs import FILES

from pard_train.downloads import SMOLLM2

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (512, 2048, 8192, 32768)  # tokens of a document
SPEEDUPS = {512: 5, 2048: 10}  # goals at the lengths that are measured beside the dense reference


@dataclass(frozen=True)
class Part:
    """One process that measures something.

    Attributes:
        name: of its files in the output folder.
        title: for its page.
        command: from the seconds it may take to its command line, when it starts. The process writes pages and figures
            (JSON) into the folder that $BENCHMARK_RESULTS names.
        limit: seconds after which it is ended.
        least: seconds without which it is not started.
        files: packages whose files it reads (see FILES).
        after: a part that runs first, if both are still to run.
    """

    name: str
    title: str
    command: Callable[[float], Sequence[str]]
    limit: float
    least: float
    files: tuple[str, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class Goal:
    """A figure of a part and its bound; without one it is for information."""

    title: str
    part: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def wanted(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f"at least {shown(self.at_least)}"
        return "" if self.at_most is None else f"at most {shown(self.at_most)}"

    def verdict(self, value: float | None) -> str:
        """met | missed | not measured; empty for information.

        >>> Goal("ratio", "replay", "speedup", at_least=20).verdict(19.5)
        'missed'
        """
        if value is None:
            return "not measured"
        if self.at_least is not None:
            return "met" if value >= self.at_least else "missed"
        return "" if self.at_most is None else "met" if value <= self.at_most else "missed"


def shown(value: float) -> str:
    """A figure for a table: thousands in full, otherwise three digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _training_goals(length: int) -> list[Goal]:
    part, tokens = f"training-{length}", f"{length:,} tokens"
    beside = [
        Goal(f"supervised tokens/s over the reference's, {tokens}", part, "speedup", at_least=SPEEDUPS.get(length)),
        Goal(f"memory over the reference's, {tokens}", part, "memory_ratio", at_most=0.25),
    ]
    return [
        *(beside if length in SPEEDUPS else []),
        Goal(f"share of the measured matrix rate, {tokens}", part, "matrix_share", at_least=0.5),
        Goal(f"compilations in timed steps, {tokens}", part, "compilations", at_most=0),
        Goal(f"peak memory in GB, {tokens}", part, "memory_gb"),
    ]


GOALS = (
    Goal("GPU tests that pass", "tests", "passed", at_least=1),
    Goal("GPU tests that fail", "tests", "failed", at_most=0),
    *(goal for length in LENGTHS for goal in _training_goals(length)),
    Goal("documents of 32,768 tokens that fit", "training-32768", "fits", at_least=1),
    Goal("supervised tokens of the real run", "real", "supervised_tokens", at_least=1e6),
    Goal("distinct supervised tokens of the real run", "real", "distinct_tokens"),
    Goal("points of its learning curve", "real", "curve_points", at_least=5),
    Goal("compilations in the real run after its first logs", "real", "compilations", at_most=0),
    Goal("tau before training", "real", "tau_first"),
    Goal("tau at its best", "real", "tau_best"),
    Goal("best K as predicted", "best-k", "predicted_best_k"),
    Goal("best K as measured", "best-k", "measured_best_k"),
    Goal("replay over live decoding, bfloat16", "replay-bfloat16", "speedup", at_least=20),
    Goal("replay over live decoding, float32", "replay-float32", "speedup", at_least=20),
    Goal("compiled decoding: PARD over plain, batch 1", "decoding", "pard_ratio"),
    Goal("compiled decoding: transformers over plain, batch 1", "decoding", "transformers_ratio"),
)


@dataclass(frozen=True)
class Plan:
    """All parts of a call.

    Attributes:
        folder: of the results.
        is_rehearsal: tiny sizes, for the CPU.
    """

    folder: Path
    is_rehearsal: bool = False

    def parts(self) -> list[Part]:
        """In the order in which they run."""
        full = "--dtype bfloat16 --compiled --num-draft-tokens 8 --prompts 4 --max-new-tokens 64 --rounds 2"
        tiny = "--num-draft-tokens 2 --prompts 1 --max-new-tokens 4 --rounds 1 --batch-sizes 1"
        decoding = self._program("decoding", full, tiny)
        return [
            self._tests(),
            self._training(512, "--rounds 8"),
            self._training(2048, "--rounds 5"),
            self._training(8192, "--rounds 5"),
            self._training(32768, "--rounds 3", "--gradient-checkpointing"),
            self._real("real", "A real run: SmolLM2-135M trained on its own answers", (float("inf"), 300), after=""),
            self._replay("bfloat16"),
            self._replay("float32"),
            self._real("best-k", "Predicted and measured best K of its draft", (300, 100), "--live", after="real"),
            self._decoding("decoding", "Decoding compiled with graph capture", decoding, (300, 100)),
        ]

    def _program(self, name: str, full: str, tiny: str, *more: str) -> list[str]:
        return [sys.executable, f"benchmarks/{name}.py", *(tiny if self.is_rehearsal else full).split(), *more]

    def _limits(self, limit: float, least: float) -> tuple[float, float]:
        return (150, 15) if self.is_rehearsal else (limit, least)

    def _tests(self) -> Part:
        files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())
        names = [str(path.relative_to(ROOT)) for path in files]
        report = f"--junitxml={self.folder / 'tests' / 'junit.xml'}"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", report, *names]
        return Part("tests", "GPU tests", lambda _: command, *self._limits(180, 45))

    def _training(self, length: int, full: str, *more: str) -> Part:
        full = f"--models qwen2.5-0.5b --lengths {length} --tokens {max(length, 4096)} --compile {full}"
        tiny = f"--models smollm2-135m:1 --lengths {length // 256 + 16} --tokens 32 --rounds 1"
        alone = [] if length in SPEEDUPS else ["--skip-reference"]
        command = self._program("training", full, tiny, "--precision", "bf16", "--k", "8", *alone, *more)
        title = f"Training at {length:,} tokens{' alone' if alone else ', beside the reference'}"
        files = (SMOLLM2[0],) if self.is_rehearsal else ()
        return Part(f"training-{length}", title, lambda _: command, *self._limits(180, 75), files)

    def _real(self, name: str, title: str, limits: tuple[float, float], *more: str, after: str) -> Part:
        where = ["--output", str(self.folder / "real"), *more, *(["--rehearse"] if self.is_rehearsal else [])]

        def _command(seconds: float) -> list[str]:
            return self._program("gpu_run", "", "", "--seconds", f"{seconds:.0f}", *where)

        return Part(name, title, _command, *self._limits(*limits), tuple(FILES), after)

    def _replay(self, dtype: str) -> Part:
        full, tiny = "--prompts 24 --tokens 128", "--prompts 2 --tokens 6 --rounds 1 --benchmarks humaneval"
        command = self._program("replay", full, tiny, "--dtype", dtype)
        return self._decoding(f"replay-{dtype}", f"Replay against live decoding, {dtype}", command, (150, 60))

    def _decoding(self, name: str, title: str, command: list[str], limits: tuple[float, float]) -> Part:
        """With the draft of the real run, if there is one by then."""

        def _command(_: float) -> list[str]:
            run = self.folder / "real" / "train"
            made = [str(path) for path in (run / "draft", run / "best") if path.is_dir()]
            return [*command, "--draft", made[0]] if made else command

        return Part(name, title, _command, *self._limits(*limits), tuple(FILES), "real")
