"""Word perplexity of language models of one size on WikiText-2.

python -m experiments.wikitext2.run --data_dir=DIR [--arms=efla,deltanet,softmax] [--epochs=1] [--seeds=3]
                                    [--rates=1e-3,2e-3,4e-3,8e-3] [--vocab_size=4096] [--output=DIR] [--commit=HASH]

DIR holds train.txt.xz, valid.txt.xz and test.txt.xz, the word-level WikiText-2 as one text each. A BPE is trained on
the training text. Every arm sees the same tokens in the same order, from the same seeds, at each learning rate; the
rate is chosen by validation, and the test text is scored at that rate alone.
"""

import dataclasses
from pathlib import Path

from absl import app, flags, logging

from efla_jax.data.text.sources import open_source
from efla_jax.data.text.store import tokenise
from efla_jax.data.text.tokenizers import load_tokenizer, train_bpe
from efla_jax.evaluation.perplexity import line_ends
from efla_jax.models import LanguageModelConfig
from efla_jax.training.config import load_config
from experiments.provenance import provenance
from experiments.wikitext2.report import write
from experiments.wikitext2.study import run_arm

_DATA = flags.DEFINE_string("data_dir", None, "folder of train.txt.xz, valid.txt.xz, test.txt.xz", required=True)
_ARMS = flags.DEFINE_list("arms", ["efla", "deltanet", "softmax"], "arms: arguments of configs/lm_wikitext2.py")
_EPOCHS = flags.DEFINE_integer("epochs", 1, "passes over the training text", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "number of seeds, 0 … N-1", lower_bound=1)
_RATES = flags.DEFINE_list("rates", ["1e-3", "2e-3", "4e-3", "8e-3"], "peak learning rates, each for every arm")
_VOCABULARY = flags.DEFINE_integer("vocab_size", 4096, "tokens of the BPE")
_OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "folder of the results")
_COMMIT = flags.DEFINE_string("commit", None, "the commit that is run, where this is no git checkout")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    folder, output = Path(_DATA.value), Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    sources = {split: open_source(str(folder / f"{split}.txt.xz")) for split in ("train", "valid", "test")}
    bpe = output / f"bpe{_VOCABULARY.value}.json"
    train_bpe(sources["train"], _VOCABULARY.value, bpe)
    tokenizer = load_tokenizer(bpe)
    bpe.unlink()  # made again from the training text by whoever wants it
    stores = {split: tokenise(source, tokenizer) for split, source in sources.items()}
    words = {split: stores[split].text_words + line_ends(source) for split, source in sources.items()}
    grid = {"rates": [float(rate) for rate in _RATES.value], "seeds": list(range(_SEEDS.value)), "words": words}
    arms = {}
    for name in _ARMS.value:
        config = load_config(f"configs/lm_wikitext2.py:{name}")
        assert isinstance(config.model, LanguageModelConfig)
        tokens = len(stores["train"].tokens) + stores["train"].documents
        steps = _EPOCHS.value * tokens // (config.train.batch_size * config.data.sequence_length)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size),
            optimizer=dataclasses.replace(config.optimizer, warmup_steps=steps // 10),
            train=dataclasses.replace(config.train, steps=steps),
        )
        arms[name] = run_arm(name, config, stores, tokenizer.separator, grid)
        perplexity = arms[name]["test_word_perplexity"]["sliding"]
        print(f"{name}: rate {arms[name]['rate']:g}, test {[round(x, 1) for x in perplexity]} per word", flush=True)
    options = (
        f"--data_dir=DIR --arms={','.join(_ARMS.value)} --epochs={_EPOCHS.value} --seeds={_SEEDS.value} "
        f"--rates={','.join(_RATES.value)} --vocab_size={_VOCABULARY.value}"
    )
    results = provenance(f"python -m experiments.wikitext2.run {options}", _COMMIT.value) | {
        "epochs": _EPOCHS.value,
        "steps": steps,
        "training tokens a pass": tokens,
        "words": words,
        "rates": grid["rates"],
        "seeds": grid["seeds"],
        "arms": arms,
    }
    title = f"WikiText-2, {_EPOCHS.value} pass{'es' if _EPOCHS.value > 1 else ''}, {_SEEDS.value} seeds"
    write(results, output, title)


if __name__ == "__main__":
    app.run(main)
