"""Check that a serving engine does with an exported draft what replay says: same text, same acceptance counters.

    bash launch/vllm_cpu.sh     # once: vLLM in an environment of its own
    python recipes/verify.py draft=outputs/my-draft/export target=Qwen/Qwen2.5-7B-Instruct \\
        engine_python=.venv-vllm/bin/python output_dir=outputs/my-draft/verification

Ends with status 0 if they agree, 3 if they differ (the first slot that does is named), 2 if something is set wrong.
"""

from __future__ import annotations

import sys

from pard_train.config import VerifyConfig
from pard_train.program import hydra_program
from pard_train.validation import validate_verify

DIFFERS = 3  # exit status


def run(config: VerifyConfig) -> None:
    """Verify, show the counters, and say by the exit status whether they agree."""
    from pard_train.publishing.verification import VERIFICATION_FILE, render_verification, verify

    report = verify(config)
    print(f"\n{render_verification(report)}\nresult: {config.output_dir}/{VERIFICATION_FILE}")
    if not report["agrees"]:
        sys.exit(DIFFERS)


def main() -> None:
    """Entry point of `pard-verify`."""
    hydra_program("verify", validate_verify, run)


if __name__ == "__main__":
    main()
