"""The `efla` command: a thin layer over the library.

efla train --config=FILE[:ARGUMENT] --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
           [--distributed | --coordinator_address=HOST:PORT --num_processes=N --process_id=I]
efla evaluate --workdir=DIR [--data_dir=DIR] [--split=test|train]
efla evaluate --workdir=DIR [--source=SOURCE] [--text_field=NAME] [--separator=LINE] [--protocol=packed|sliding]
           [--length=N] [--stride=N] [--words=N] [--batch_size=N] [--output=FILE.json]
efla evaluate --workdir=DIR --tasks=lambada,piqa,… --task_data=DIR [--limit=N] [--batch_size=N] [--output=FILE.json]
efla generate --workdir=DIR|--artifact=DIR [--prompt=TEXT|--prompt_file=FILE] [--max_new_tokens=N] [--temperature=T]
           [--top_k=N] [--top_p=P] [--seed=N] [--stop=TEXT] [--stream]
efla tokenizer train --source=SOURCE --vocab_size=N --output=FILE.json [--text_field=NAME] [--separator=LINE]
efla export --workdir=DIR --output=DIR2 [--platforms=cpu,cuda,tpu] [--batch_sizes=1,4] [--lengths=1,64,512]
            [--implementations=cuda:pallas_gpu]
efla export --workdir=DIR --output=DIR2 --format=fla
efla import --format=fla --input=DIR --output=DIR2 [--tokenizer=SPEC]
efla plot --workdir=DIR[,DIR2,…] --output=FILE.png [--metric=loss]
efla compare --shape=B,T,H,K,V [--implementations=scan,xla,pallas_gpu,…] [--dtype=bfloat16|float16|float32] [--backward]
           [--packed=DOCUMENTS] [--key_heads=N] [--log_decay] [--repeats=N] [--output=DIR]
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax

from efla_jax.choices import nearest
from efla_jax.commands.comparing import compare
from efla_jax.commands.measuring import evaluate
from efla_jax.commands.models import export, generate, import_
from efla_jax.commands.options import UsageError
from efla_jax.commands.training import plot, tokenizer, train
from efla_jax.errors import UserError

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "tokenizer": tokenizer,
    "export": export,
    "import": import_,
    "plot": plot,
    "compare": compare,
}


def _configure() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("efla_jax").setLevel(logging.INFO)
    if jax.config.jax_compilation_cache_dir is None:  # programs are compiled once a machine, not once a run
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "efla_jax" / "programs"))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command. What the user can put right ends in one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] == "help" or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return
    _configure()
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
        COMMANDS[name](rest)
    except UserError as error:
        print(f"efla {name}: {error}", file=sys.stderr)
        _leave(2)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


def _leave(status: int) -> NoReturn:
    """Ends this process after an error, and leaves its cluster at once, so that the others notice: the usual end would
    wait for them, while they wait for this process."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
