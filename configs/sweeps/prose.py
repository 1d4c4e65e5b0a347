"""The text of the first study, which studies take by the word `prose`: ten English texts, 44 MB, in a byte-level BPE of 1,024 tokens.

    scaling-jax train-tokenizer --input='prose/*.txt.xz' --vocab_size=1024 --out=data/prose.json
    scaling-jax tokenize --input='prose/*.txt.xz' --out=data/prose --tokenizer=data/prose.json --stretch_characters=65536

Any other text will do, with data of its own: prose/ stands for a folder of text files, 40 MB of them for one pass of the longest runs.
What is held out is every tenth stretch of some 60 kB, so that it lies all over every text.
"""

VOCAB = 1024


def on_prose(config):
    """Changes a config to train on it."""
    config.data.path, config.data.tokenizer, config.model.vocab_size = "data/prose", "data/prose.json", VOCAB
    return config
