"""An engine that does what replay says is told apart from one that does not, and the first slot that differs is named.

The oracle of the fast tests is the loop of vLLM and PACE told once more and simply; the slow ones run the engines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_model, config_for, conversations, experiment, write_served_pair
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from vllm_server import ROOT, vllm_python

from pard_train.config import Config, DraftConfig, ModelConfig
from pard_train.downloads import unpack_model
from pard_train.engines.process import run
from pard_train.engines.worker import Counters, EngineAnswer, EngineRequest, EngineResult, engine_arguments
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.proposers import Drafter
from pard_train.model import inspect_base, write_initial_draft
from pard_train.publishing.differences import (
    FIRST_POSITION,
    LATER_POSITION,
    NOT_DRAFTED,
    NOT_EXACT,
    NOT_K,
    NOT_LOSSLESS,
    Difference,
    Expectation,
    find_difference,
)
from pard_train.publishing.export import export
from pard_train.publishing.verification import VERIFICATION_FILE, compare_prompts, expect, render_verification, verify
from pard_train.targets.regeneration import write_answers
from pard_train.training.trainer import train
from pard_train.validation import validate_verify

MASK = 300  # the one row of these models that is no token
PROMPTS = [[1, 120, 130, 140, 2], [1, 40, 50, 60, 2], [1, 90, 2]]
NEVER = Limits(24, frozenset({-1}))


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """A target whose text both repeats itself and moves on."""
    model = build_model("qwen2", seed=3, num_rows=MASK + 1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def drafter(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """The target's own weights with a little noise: its drafts match anything from no token to all."""
    return Drafter(noisy_copy(target), tokenizer)


def noisy_copy(target: PreTrainedModel) -> PreTrainedModel:
    draft = AutoModelForCausalLM.from_config(target.config, dtype=torch.float32).eval()
    draft.load_state_dict(target.state_dict())
    draws = torch.Generator().manual_seed(1)
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=draws)
    draft.config.pard_token = draft.config.mask_token_id = MASK
    return draft


@torch.inference_mode()
def greedy(target: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy text without a cache."""
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(target(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@torch.inference_mode()
def serve(
    target: PreTrainedModel, drafter: Drafter, prompt: list[int], limits: Limits, k: int, engine: str = "vllm"
) -> EngineAnswer:
    """An engine's loop, without caches: K tokens are drafted and verified every step; vLLM's prefill gives a token."""
    answer = greedy(target, prompt, 1) if engine == "vllm" else []
    accepted: list[int] = []
    drafts: list[list[int]] = []
    while not limits.is_over(answer):
        text = prompt + answer
        masks = [drafter.mask_token_id] * (k - 1)
        draft = drafter.choose(drafter.model(torch.tensor([text + masks])).logits[0, len(text) - 1 :]).tolist()
        own = target(torch.tensor([text + draft])).logits[0, len(text) - 1 :].argmax(dim=-1).tolist()
        num = 0
        while num < k and draft[num] == own[num]:
            num += 1
        accepted.append(num)
        drafts.append(draft)
        answer += limits.cut(own[: num + 1], len(answer))
    return EngineAnswer(answer, accepted, drafts, Counters.of(accepted, k), 0.0)


def expectation(
    target: PreTrainedModel, drafter: Drafter, limits: Limits, k: int, prompt: list[int], engine: str = "vllm"
) -> Expectation:
    """What replay says of one prompt, as an engine counts."""
    text = greedy(target, prompt, limits.max_new_tokens + k)
    return expect(drafter, {"bench 0": prompt}, [text], limits, num_draft_tokens=k, engine=engine)[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is expected
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "engine"), [(1, "vllm"), (3, "vllm"), (5, "vllm"), (1, "pace"), (4, "pace")])
def test_replay_foretells_every_step_of_the_engine_wherever_the_answer_ends(
    target: PreTrainedModel, drafter: Drafter, k: int, engine: str
) -> None:
    seen: set[int] = set()
    for prompt in PROMPTS[:2]:
        for end in {-1, *greedy(target, prompt, 24)}:  # -1: the length limit ends it
            for length in (1, 2, 7, 24):
                limits = Limits(length, frozenset({end}))
                ours = expectation(target, drafter, limits, k, prompt, engine)
                theirs = serve(target, drafter, prompt, limits, k, engine)
                assert find_difference(drafter, ours, theirs, k) is None
                assert ours.accepted == theirs.accepted
                seen |= set(ours.accepted)
    assert seen >= {0, 1, k}


def test_counters_add_up_position_by_position() -> None:
    parts = [Counters.of(accepted, 3) for accepted in ([0, 3], [], [1, 1, 2])]
    total = Counters.total(parts)
    assert total == Counters(5, 15, 7, [4, 2, 1]) == Counters.of([0, 3, 1, 1, 2], 3)
    assert total - parts[0] == parts[2]


# ---------------------------------------------------------------------------------------------------------------------
# What differs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(target: PreTrainedModel, drafter: Drafter) -> tuple[Expectation, EngineAnswer]:
    """Expectation and an answer that agrees with it, at K = 4; the steps accept anything from no token to all."""
    return expectation(target, drafter, NEVER, 4, PROMPTS[0]), serve(target, drafter, PROMPTS[0], NEVER, 4)


def difference(drafter: Drafter, pair: tuple[Expectation, EngineAnswer], **changes: Any) -> Difference:
    """Where an engine that did something else is told to differ; its counters follow from what it did."""
    expected, answer = pair
    changed = replace(answer, **changes)
    if "counters" not in changes:
        changed = replace(changed, counters=Counters.of(changed.accepted, 4))
    found = find_difference(drafter, expected, changed, 4)
    assert found is not None
    return found


def test_a_text_that_depends_on_the_draft_is_named_by_its_first_token(
    drafter: Drafter, pair: tuple[Expectation, EngineAnswer]
) -> None:
    ids = list(pair[1].token_ids)
    found = difference(drafter, pair, token_ids=[*ids[:9], ids[9] ^ 1, *ids[10:]])
    assert (found.token, found.step, found.hint) == (9, None, NOT_LOSSLESS)
    assert f"(id {ids[9]})" in found.expected
    assert f"(id {ids[9] ^ 1})" in found.observed
    assert difference(drafter, pair, token_ids=ids[:-1]).observed == "the end"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_first_slot_that_is_drafted_otherwise_is_named(
    target: PreTrainedModel, drafter: Drafter, pair: tuple[Expectation, EngineAnswer], depth: int
) -> None:
    """An engine whose draft is wrong at one depth of one step, and which goes on from there as vLLM would."""
    expected, answer = pair
    step = next(i for i, accepted in enumerate(expected.accepted) if accepted > depth and i > 0)
    first = 1 + sum(a + 1 for a in expected.accepted[:step])
    wrong = [token ^ (place == depth) for place, token in enumerate(answer.drafts[step])]
    accepted, drafts = [*answer.accepted[:step], depth, 0], [*answer.drafts[:step], wrong, wrong]
    found = difference(drafter, pair, accepted=accepted, drafts=drafts)
    assert (found.prompt_id, found.step, found.position, found.token) == ("bench 0", step, depth + 1, first + depth)
    says = expected.answer_ids[first + depth]
    assert found.expected.startswith(f"{expected.accepted[step]} accepted (replay drafts ")
    assert found.expected.count(f"(id {says})") == 2  # by replay and by the target
    assert found.observed.startswith(f"{depth} accepted")
    assert found.observed.endswith(f"(id {wrong[depth]}))")
    assert found.hint == (LATER_POSITION if depth else FIRST_POSITION)
    assert str(found).startswith(f"prompt bench 0, step {step}, draft position {depth + 1}, token {first + depth}: ")


def test_a_slot_that_the_engine_drafts_rightly_and_replay_wrongly_is_named_without_its_drafts(
    drafter: Drafter, pair: tuple[Expectation, EngineAnswer]
) -> None:
    expected, answer = pair
    step = next(i for i, accepted in enumerate(expected.accepted) if accepted < 4)
    more = [*answer.accepted[:step], answer.accepted[step] + 1, *answer.accepted[step + 1 :]]
    found = difference(drafter, pair, accepted=more, drafts=[])
    assert (found.step, found.position) == (step, expected.accepted[step] + 1)
    assert found.observed == f"{expected.accepted[step] + 1} accepted"


def test_steps_that_are_missing_are_a_difference(drafter: Drafter, pair: tuple[Expectation, EngineAnswer]) -> None:
    found = difference(drafter, pair, accepted=pair[1].accepted[:-1])
    assert found.step == len(pair[1].accepted) - 1


def test_drafts_of_less_than_k_tokens_are_a_difference(
    drafter: Drafter, pair: tuple[Expectation, EngineAnswer]
) -> None:
    counters = pair[1].counters
    short = replace(counters, num_draft_tokens=counters.num_draft_tokens - 1)
    found = difference(drafter, pair, counters=short)
    assert (found.step, found.hint) == (None, NOT_K)
    assert found.expected == f"{counters.num_draft_tokens} draft tokens"


@pytest.mark.parametrize("token", [MASK, MASK + 7])
def test_an_engine_that_drafts_what_is_no_token_is_told_so(
    drafter: Drafter, pair: tuple[Expectation, EngineAnswer], token: int
) -> None:
    expected, answer = pair
    step = next(i for i, accepted in enumerate(expected.accepted) if accepted > 0)
    drafts = [*answer.drafts[:step], [token] * 4]
    assert difference(drafter, pair, accepted=[*answer.accepted[:step], 0], drafts=drafts).hint == NOT_DRAFTED


def test_a_near_tie_of_the_draft_is_told_as_one(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pair: tuple[Expectation, EngineAnswer]
) -> None:
    """The row of the token that replay drafts first gets a twin, which has the very same logit."""
    expected, answer = pair
    draft = noisy_copy(target)
    step = next(i for i, accepted in enumerate(expected.accepted) if accepted > 0)
    twin = next(token for token in range(3, MASK) if token not in expected.prompt_ids + expected.answer_ids)
    weight = draft.get_input_embeddings().weight
    weight.data[twin] = weight.data[answer.drafts[step][0]]
    changes = {"accepted": [*answer.accepted[:step], 0], "drafts": [*answer.drafts[:step], [twin] * 4]}
    assert (
        "a near tie: the draft's two best logits are 0.0e+00 apart"
        in difference(Drafter(draft, tokenizer), pair, **changes).hint
    )


def test_a_difference_in_bfloat16_is_told_to_be_looked_at_in_float32(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pair: tuple[Expectation, EngineAnswer]
) -> None:
    drafter = Drafter(noisy_copy(target).to(torch.bfloat16), tokenizer)
    step = next(i for i, accepted in enumerate(pair[0].accepted) if accepted > 0)
    hint = difference(drafter, pair, accepted=[*pair[1].accepted[:step], 0], drafts=[]).hint
    assert hint.startswith(f"{NOT_EXACT} (the draft's two best logits are ")


def test_prompts_are_compared_one_by_one_and_the_table_shows_both_sides(
    target: PreTrainedModel, drafter: Drafter
) -> None:
    expectations = [replace(expectation(target, drafter, NEVER, 4, p), prompt_id=f"bench {p[1]}") for p in PROMPTS]
    answers = [serve(target, drafter, prompt, NEVER, 4) for prompt in PROMPTS]
    report = compare_prompts(drafter, expectations, EngineResult("1.0", answers), 4)
    assert report["agrees"]
    assert report["difference"] is None
    assert report["expected"] == report["observed"]
    assert report["num_equal_texts"] == 3

    # Two prompts trade a step: the totals agree, the prompts do not.
    moved = [replace(a, accepted=list(a.accepted)) for a in answers]
    moved[1].accepted[0], moved[2].accepted[0] = 4, 0
    answers[1].accepted[0], answers[2].accepted[0] = 0, 4
    moved = [replace(a, counters=Counters.of(a.accepted, 4)) for a in moved]
    expectations = [replace(e, accepted=a.accepted) for e, a in zip(expectations, answers, strict=True)]
    report = compare_prompts(drafter, expectations, EngineResult("1.0", moved), 4)
    assert report["expected"] == report["observed"]
    assert not report["agrees"]
    assert report["difference"]["prompt_id"] == "bench 40"
    head = {"engine": "vllm", "engine_version": "1.0", "draft": "a/d", "target": "t", "dtype": "float32"}
    table = render_verification({**head, "num_draft_tokens": 4, **report}).splitlines()
    assert table[0] == "vllm 1.0: d drafts K = 4 for t in float32, 3 prompts"
    numbers = [line.split()[1:] for line in table[3:5]]
    assert numbers[0] == numbers[1]
    assert [int(n) for n in numbers[0][3:]] == report["expected"]["accepted_per_position"]
    assert table[-1].startswith("differs: prompt bench 40, step 0, draft position 1, token 1: ")


# ---------------------------------------------------------------------------------------------------------------------
# Transformers, and mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, Path]:
    """Target and draft folders."""
    return write_served_pair("qwen2", tokenizer, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": chat[0]["content"]}) + "\n" for chat in conversations(12, seed=5)))
    return path


Settings = Callable[..., Config]


@pytest.fixture
def settings(served: tuple[Path, Path], questions: Path, tmp_path: Path) -> Settings:
    """A verification of the tiny pair; keyword arguments are settings."""

    def build(**changes: Any) -> Config:
        base = {"target": str(served[0]), "draft": str(served[1]), "benchmarks": [str(questions)], "max_prompts": 6}
        base |= {"max_new_tokens": 20, "num_draft_tokens": 4, "timeout": 300.0, "output_dir": str(tmp_path / "out")}
        return config_for("verify", **base | changes)

    return build


def command(config: Config) -> list[str]:
    """The console command with these settings."""
    pairs = {**vars(config.verify), "draft.path": config.draft.path, "output_dir": config.output_dir}
    pairs |= {"benchmarks": f"[{','.join(config.verify.benchmarks)}]", "targets": f"[{','.join(config.targets)}]"}
    words = [f"{name}={'null' if value is None else value}" for name, value in pairs.items()]
    return [sys.executable, str(ROOT / "recipes" / "verify.py"), *words]


def test_transformers_agrees_and_the_command_says_so(settings: Settings) -> None:
    config = settings(engine="transformers")
    done = subprocess.run(command(config), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "agrees: text and counters are equal" in done.stdout
    report = json.loads((Path(config.output_dir) / VERIFICATION_FILE).read_text())
    assert report["agrees"]
    assert report["observed"] == report["expected"]
    assert report["observed"]["num_accepted_tokens"] > 20
    assert report["num_equal_texts"] == report["num_prompts"] == len(report["prompts"]) == 6
    assert report["made_by"]["versions"]["transformers"] == report["engine_version"]


def write_odd_draft(draft: Path, folder: Path, **keys: Any) -> Path:
    """A copy of a draft whose config.json says something else; a key of None is left out."""
    folder.mkdir()
    for file in draft.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((draft / "config.json").read_text()), **keys}
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_what_cannot_be_served_is_told_before_an_engine_starts(
    served: tuple[Path, Path], questions: Path, settings: Settings, tmp_path: Path
) -> None:
    namesake = tmp_path / "other" / questions.name
    bare = write_odd_draft(served[1], tmp_path / "bare", pard_token=None, mask_token_id=None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    namesake.write_text('{"prompt": "another question"}')
    mistakes = {
        "is not a parallel draft model": {"draft": str(bare)},
        "the config cannot be loaded": {"draft": str(tmp_path / "none")},
        "positions, but prompt, answer and draft": {"max_new_tokens": 3000},
        "benchmark 'no-such'": {"benchmarks": ["no-such"]},
        "are both named questions: rename one": {"benchmarks": [str(questions), str(namesake)]},
        "is not empty and holds no run": {"output_dir": str(tmp_path / "other")},
    }
    for message, changes in mistakes.items():
        with pytest.raises(UserError, match=message):
            verify(settings(engine_python="/no/python", **changes))
        assert not (tmp_path / "out").exists()
    done = subprocess.run(command(settings(engine="sglang")), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "engine=sglang: must be vllm | pace | transformers" in done.stderr


def test_a_vocabulary_that_vllm_would_refuse_is_refused_with_the_remedy(
    served: tuple[Path, Path], settings: Settings, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(served[1])
    model.resize_token_embeddings(340, mean_resizing=False)
    short = write_odd_draft(served[1], tmp_path / "long", vocab_size=340)
    model.save_pretrained(short)
    with pytest.raises(UserError, match=r"vocabulary rows: draft 340, target 320: .*recipes/export.py"):
        verify(settings(draft=str(short), engine_python="/no/python"))


@pytest.mark.parametrize(
    ("draft", "arguments", "message"),
    [
        ("draft", {"tensor_parallel_size": 8}, r"tensor parallelism: 1, 2 ways .*serve with 2 at most"),
        ("eagle-like", {}, r"path: vLLM takes .*eagle-like for another kind of draft because of 'eagle-': rename"),
    ],
)
def test_what_vllm_would_refuse_after_loading_the_target_is_refused_before(
    draft: str,
    arguments: dict[str, Any],
    message: str,
    served: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    tmp_path: Path,
) -> None:
    wide = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    build_model("qwen2", seed=1, **wide).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    pair = {"draft": str(shutil.copytree(served[1], tmp_path / draft)), "target": str(tmp_path / "target")}
    with pytest.raises(UserError, match=message):
        verify(settings(**pair, engine_arguments=arguments, engine_python="/no/python"))


def test_another_verification_in_the_folder_is_not_overwritten(settings: Settings) -> None:
    verify(settings(engine="transformers", max_prompts=1, max_new_tokens=4))
    verify(settings(engine="transformers", max_prompts=1, max_new_tokens=4))  # the same one may be repeated
    with pytest.raises(UserError, match="max_new_tokens: 4 -> 5"):
        verify(settings(engine="transformers", max_prompts=1, max_new_tokens=5))


def test_what_the_error_of_an_engine_advises_can_be_done_in_the_same_folder(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine_python=/no/python cannot be started"):
        verify(settings(engine_python="/no/python"))
    slow = write_interpreter(tmp_path / "python", "import time; time.sleep(60)")
    with pytest.raises(UserError, match="timeout=1 s exceeded"):
        verify(settings(engine_python=slow, timeout=0.5))
    with pytest.raises(UserError, match=r"max_new_tokens: 20 -> 5"):
        verify(settings(engine_python=slow, max_new_tokens=5))


# ---------------------------------------------------------------------------------------------------------------------
# The engine's process
# ---------------------------------------------------------------------------------------------------------------------

REQUEST = EngineRequest("target", "draft", 4, [[1, 2]], 8, [2])


def write_interpreter(path: Path, program: str) -> str:
    """An executable that stands where the engine's Python would."""
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('no room left'); sys.exit(7)", r"it ended with status 7: no room left"),
        ("import os; os.kill(os.getpid(), 9)", r"it was killed by signal 9"),
        (
            "print('(EngineCore pid=7) ERROR [core.py:9] OSError: no room left')\n"
            "raise SystemExit('RuntimeError: Engine core initialization failed. See root cause above.')",
            r"it ended with status 1: OSError: no room left",
        ),
    ],
)
def test_an_engine_that_dies_is_told_in_one_line_with_its_log(tmp_path: Path, program: str, reason: str) -> None:
    python = write_interpreter(tmp_path / "python", program)
    log = tmp_path / "out" / "log.txt"
    with pytest.raises(UserError, match=rf"^the vLLM engine failed: {reason} \(log: {log}\)$"):
        run(REQUEST, python=python, folder=tmp_path / "out", timeout=60)


def test_an_environment_without_the_engine_is_told_how_to_make_one(tmp_path: Path) -> None:
    """The real worker, under a Python that has neither engine: this one."""
    with pytest.raises(UserError, match=r"No module named 'vllm' .*launch/vllm_cpu.sh"):
        run(REQUEST, python=None, folder=tmp_path, timeout=60)
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    with pytest.raises(UserError, match=r"the PACE engine failed: .*No module named 'pace' .*launch/pace_cpu.sh"):
        run(replace(REQUEST, engine="pace"), python=None, folder=tmp_path, timeout=60)
    with pytest.raises(UserError, match=r"engine_python=/no/python cannot be started: No such file"):
        run(REQUEST, python="/no/python", folder=tmp_path, timeout=60)


def test_the_engines_python_may_be_older_and_sees_no_module_of_ours(tmp_path: Path) -> None:
    """An interpreter that knows no -P, as Python 3.10 does not, with a vLLM that tells what is in its way."""
    (tmp_path / "vllm.py").write_text("import sys\nraise ImportError(f'path: {sys.path}')\n")
    program = (
        "import os, sys\n"
        "if sys.argv[1].startswith('-'): sys.exit(f'Unknown option: {sys.argv[1]}')\n"
        f"os.execve({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]], "
        f"{{**os.environ, 'PYTHONPATH': {str(tmp_path)!r}}})"
    )
    with pytest.raises(UserError, match="ImportError: path: ") as error:
        run(REQUEST, python=write_interpreter(tmp_path / "python", program), folder=tmp_path / "out", timeout=60)
    assert str(tmp_path) in str(error.value)
    assert str(ROOT / "pard_train" / "engines") not in str(error.value)


SLEEPER = """
import os, runpy, sys
from pathlib import Path
sys.path.insert(0, {modules!r})
Path({pid_file!r}).write_text(str(os.getpid()))
sys.argv = sys.argv[1:]  # without this file's own name
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> tuple[str, Path]:
    """A Python whose vLLM never comes up, and the file where it writes its process id."""
    modules, pid_file = tmp_path / "modules", tmp_path / "pid"
    modules.mkdir()
    (modules / "vllm.py").write_text("import time\ntime.sleep(600)\n")
    program = SLEEPER.format(modules=str(modules), pid_file=str(pid_file))
    return write_interpreter(tmp_path / "python", program), pid_file


def wait_until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_engine_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)"
    )
    python = write_interpreter(tmp_path / "python", program)
    with pytest.raises(UserError, match="timeout=3 s"):
        run(REQUEST, python=python, folder=tmp_path / "out", timeout=3)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_running, pids)))


def test_an_engine_does_not_outlive_who_started_it(sleeper: tuple[str, Path], tmp_path: Path) -> None:
    python, pid_file = sleeper
    program = (
        "from pathlib import Path; from pard_train.engines.process import EngineRequest, run; "
        f"run({REQUEST!r}, python={python!r}, folder=Path({str(tmp_path / 'out')!r}), timeout=600)"
    )
    ours = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()))
    engine = int(pid_file.read_text())
    assert is_running(engine)
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    wait_until(lambda: not is_running(engine))


# ---------------------------------------------------------------------------------------------------------------------
# vLLM itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine_python(monkeypatch: pytest.MonkeyPatch) -> str:
    """vLLM's Python. One thread: two that wait for each other on shared cores are many times slower."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return vllm_python()


def verified(config: Config) -> tuple[int, dict[str, Any], str]:
    """Exit status, verification.json and output of the command."""
    done = subprocess.run(command(config), cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, json.loads((Path(config.output_dir) / VERIFICATION_FILE).read_text()), done.stdout


@pytest.mark.slow
def test_vllm_counts_what_replay_counts_for_a_trained_export(
    engine_python: str, served: tuple[Path, Path], questions: Path, settings: Settings, tmp_path: Path
) -> None:
    """Train on the target's own answers, export, verify: equal to the last counter."""
    chats = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": json.loads(line)["prompt"]}]} for line in questions.open()]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    regenerate = config_for(
        "regenerate", target=served[0], max_new_tokens=40, batch_size=4, output_dir=str(tmp_path), seed=0
    )
    answers = write_answers(regenerate, chats, tmp_path / "answers")
    draft = train(experiment(served[0], answers, tmp_path / "run", num_train_epochs=60, learning_rate=3e-3))
    settings_of_export = {"checkpoint": str(draft), "output_dir": str(tmp_path / "export"), "dtype": "float32"}
    export(config_for("export", target=served[0], **settings_of_export))
    config = settings(draft=str(tmp_path / "export"), engine_python=engine_python, max_prompts=12, max_new_tokens=40)
    status, report, output = verified(config)
    assert status == 0, output
    assert report["observed"] == report["expected"]
    assert report["observed"]["accepted_per_position"][2] > 10  # the comparison says something about every position
    assert report["num_equal_texts"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_vllm_counts_what_replay_counts_in_other_families(
    engine_python: str, family: str, tokenizer: PreTrainedTokenizerBase, settings: Settings, tmp_path: Path
) -> None:
    target, draft = write_served_pair(family, tokenizer, tmp_path)
    config = settings(target=str(target), draft=str(draft), engine_python=engine_python)
    status, report, output = verified(config)
    assert status == 0, output
    assert report["observed"] == report["expected"]
    assert report["observed"]["num_accepted_tokens"] > 20


@pytest.mark.slow
def test_a_draft_that_vllm_serves_otherwise_is_named_with_exit_status_3(
    engine_python: str, served: tuple[Path, Path], settings: Settings, tmp_path: Path
) -> None:
    """The mask token's row wins every arg max: vLLM drafts it, replay never does."""
    odd = write_odd_draft(served[1], tmp_path / "odd")
    weights = load_file(odd / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    drafts = json.loads((odd / "config.json").read_text())["pard_token"]
    rows[drafts] = 20 * rows[:MASK].abs().mean() * torch.sign(rows[7])
    save_file(weights, odd / "model.safetensors", metadata={"format": "pt"})
    status, report, output = verified(settings(draft=str(odd), engine_python=engine_python, max_prompts=4))
    assert status == 3
    assert report["num_equal_texts"] == 4  # what is drafted never changes the text
    assert report["difference"]["hint"] == NOT_DRAFTED
    assert f"(id {drafts})" in report["difference"]["observed"]
    assert f"differs: prompt {report['difference']['prompt_id']}, step " in output


@pytest.mark.slow
def test_what_vllm_refuses_is_told_with_the_remedy(
    engine_python: str, served: tuple[Path, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(served[1])
    model.resize_token_embeddings(340, mean_resizing=False)
    long = write_odd_draft(served[1], tmp_path / "long")
    model.save_pretrained(long)
    bare = write_odd_draft(served[1], tmp_path / "bare", pard_token=None, mask_token_id=None)
    refusals = {
        r"same vocabulary size.*; export the draft again with targets=": long,
        r"must have .*`mask_token_id`.*; export the draft with recipes/export.py": bare,
    }
    for message, draft in refusals.items():
        request = EngineRequest(str(served[0]), str(draft), 4, [[1, 50, 2]], 8, [2])
        with pytest.raises(UserError, match=message):
            run(request, python=engine_python, folder=tmp_path / "engine", timeout=300)


@pytest.mark.slow
def test_smollm2_drafts_for_itself_as_replay_says(engine_python: str, settings: Settings, tmp_path: Path) -> None:
    """A real model with its untrained draft, on problems of HumanEval."""
    base = inspect_base(
        ModelConfig(path=str(unpack_model("SmolLM2-135M-Instruct"))), DraftConfig(mask_token="<empty_output>")
    )
    write_initial_draft(base, 8, tmp_path / "draft")
    config = settings(
        target=base.config.path,
        draft=str(tmp_path / "draft"),
        benchmarks=["humaneval"],
        max_prompts=3,
        max_new_tokens=32,
        num_draft_tokens=8,
        engine_python=engine_python,
        timeout=800.0,
    )
    status, report, output = verified(config)
    assert status == 0, output
    assert report["observed"] == report["expected"]
    assert report["observed"]["num_accepted_tokens"] >= 3 * 12  # the first token of every draft is the target's own


# ---------------------------------------------------------------------------------------------------------------------
# PACE itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pace_python(monkeypatch: pytest.MonkeyPatch) -> str:
    """PACE's Python: PARD_PACE_PYTHON, or that of launch/pace_cpu.sh. Skips without one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    python = Path(os.environ.get("PARD_PACE_PYTHON", ROOT / ".venv-pace" / "bin" / "python"))
    if not python.exists():
        pytest.skip("no PACE: make its environment with launch/pace_cpu.sh, or set PARD_PACE_PYTHON")
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("qwen2", "float32"), ("llama", "float32"), ("qwen3", "bfloat16")])
def test_pace_counts_what_replay_counts(
    pace_python: str, family: str, dtype: str, tokenizer: PreTrainedTokenizerBase, settings: Settings, tmp_path: Path
) -> None:
    """To the last counter in float32; in bfloat16 the text is that of plain decoding, near ties of the draft differ."""
    target, draft = write_served_pair(family, tokenizer, tmp_path)
    models = {"target": str(target), "draft": str(draft), "dtype": dtype, "max_prompts": 12}
    status, report, output = verified(settings(engine="pace", engine_python=pace_python, **models))
    assert report["num_equal_texts"] == 12
    assert report["engine_version"][0].isdigit()
    ours, theirs = report["expected"], report["observed"]
    assert theirs["num_accepted_tokens"] > 20
    if dtype == "float32":
        assert status == 0, output
        assert theirs == ours
    else:
        assert theirs["num_accepted_tokens"] == pytest.approx(ours["num_accepted_tokens"], rel=0.1)


@pytest.mark.slow
def test_what_pace_refuses_is_told_with_the_remedy(
    pace_python: str, served: tuple[Path, Path], settings: Settings, tmp_path: Path
) -> None:
    """PACE reads pard_token alone; and its list of mask tokens ends at 32."""
    bare = write_odd_draft(served[1], tmp_path / "bare", pard_token=None)
    request = EngineRequest(str(served[0]), str(bare), 4, [[1, 50, 2]], 8, [2], engine="pace")
    with pytest.raises(UserError, match=r"PARD token must be set.*; export the draft with recipes/export.py"):
        run(request, python=pace_python, folder=tmp_path / "engine", timeout=300)
    status, report, output = verified(
        settings(engine="pace", engine_python=pace_python, num_draft_tokens=33, max_prompts=2)
    )
    assert status == 0, output
    assert report["observed"]["num_draft_tokens"] == 33 * report["observed"]["num_drafts"]
    done = subprocess.run(
        command(settings(engine="pace", num_draft_tokens=34)), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "verify.num_draft_tokens=34: PACE drafts at most 33 tokens a step" in done.stderr


def test_arguments_of_an_engine_reach_it_or_are_refused() -> None:
    sized = replace(REQUEST, engine_arguments={"tensor_parallel_size": 8})
    assert engine_arguments(sized) == {**engine_arguments(REQUEST), "tensor_parallel_size": 8}
    config = config_for("verify", engine="transformers", engine_arguments={"tensor_parallel_size": 8})
    config.draft.path, config.targets, config.output_dir = "draft", ["target"], "out"
    with pytest.raises(UserError, match=r"engine=transformers does not take tensor_parallel_size"):
        validate_verify(config)
