"""Score a language model by the likelihood of texts: a program for ``weightops --score``.

weightops patch --score "python judge.py code.txt prose.txt" --task code --supported prose ...

weightops adds the folder of a model to the arguments. A line of JSON says the score of an item: the
higher, the better. An item is a stretch of a text here, a task a text. Messages go to stderr.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 32  # tokens of an item

*texts, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
for text in map(Path, texts):
    tokens = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    for i, item in enumerate(tokens.split(LENGTH)):
        if len(item) > 1:
            with torch.no_grad():
                loss = model(input_ids=item[None], labels=item[None]).loss
            print(json.dumps({"task": text.stem, "item": i, "value": -loss.item()}))
