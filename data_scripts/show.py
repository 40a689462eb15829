"""See with own eyes what a draft model would be taught, before a training run costs anything.

    python data_scripts/show.py experiment=qwen2.5-0.5b data.source=answers.jsonl show.row=3 \\
        show.picture=pattern.png output_dir=/tmp/show

Checks the first show.num_checked rows, then prints one row: its tokens in colours (FORCE_COLOR=1 keeps them in a pipe),
the slots they become, and on request a picture of who sees whom. No weights are loaded and no tokens are stored.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from pard_train.config import Config
from pard_train.data.chat import ChatEncoder
from pard_train.data.examples import read_documents, show
from pard_train.data.inspection import check_taught, count_taught, cut, legend, summary
from pard_train.errors import UserError
from pard_train.model import inspect_base
from pard_train.program import hydra_program
from pard_train.validation import validate_show


def run(config: Config) -> None:
    """Check the data, print a row and draw its picture."""
    data, row = config.data, config.show.row
    base = inspect_base(config.model, config.draft)
    encoder = ChatEncoder(base.tokenizer, data.template_kwargs)
    counts = check_taught(read_documents(data, encoder, 0, config.show.num_checked or None), encoder, data)
    documents = list(read_documents(data, encoder, row, row + 1))
    if not documents:
        raise UserError(f"show.row={row}: {data.source} has no such row (the first is 0), or it is a bad one")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(f"checked: {summary(counts, data)}", legend(), sep="\n")
    for document in documents:
        console.print(Text(f"\n{document.origin}", "bold"))
        console.print(summary(count_taught(document, encoder, data), data))
        show(cut(document, data), config, base, encoder, console)


if __name__ == "__main__":
    hydra_program("show", validate_show, run)
