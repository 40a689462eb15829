"""Check that a serving engine does with an exported draft what replay says: same text, same acceptance counters.

    make vllm     # once: vLLM in its own virtual environment; make pace for engine=pace
    python recipes/verify.py draft.path=outputs/my-draft/export targets=[Qwen/Qwen2.5-7B-Instruct] \\
        engine_python=.venv-vllm/bin/python output_dir=outputs/my-draft/verification

With preflight=true it only checks, within seconds, what is known before an engine starts.

Exit status 0: they agree. Exit status 3: they differ, and the first difference is printed. Exit status 2: an error.
"""

from __future__ import annotations

import sys

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_verify

DIFFERS = 3  # exit status


def run(config: Config) -> None:
    """Verify, print the counters, and exit with a status that says whether they agree."""
    from pard_train.publishing.verification import VERIFICATION_FILE, preflight, render_verification, verify
    from pard_train.targets.compatibility import require

    if config.verify.preflight:
        findings = preflight(config)
        print(*findings, sep="\n")
        require(findings)
        return
    report = verify(config)
    print(f"\n{render_verification(report)}\nresult: {config.output_dir}/{VERIFICATION_FILE}")
    if not report["agrees"]:
        sys.exit(DIFFERS)


if __name__ == "__main__":
    hydra_program("verify", validate_verify, run)
