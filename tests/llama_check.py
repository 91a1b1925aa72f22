"""Run a GGUF file with llama.cpp: python tests/llama_check.py FILE N PROMPT…

Prints one JSON object per prompt. tests/test_export.py runs it with the Python of $LLAMA_PYTHON,
which has llama-cpp-python; it imports nothing of ours.
"""

import json
import sys

import llama_cpp

F32 = 0  # keys and values unrounded, as ours are
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=0, verbose=False, type_k=F32, type_v=F32, logits_all=True
)
for prompt in sys.argv[3:]:
    ids = model.tokenize(prompt.encode())
    model.reset()
    written: list[int] = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=False):
        written.append(token)
        if len(written) == int(sys.argv[2]) or token == model.token_eos():
            break
    logits = model.scores[len(ids) - 1].tolist()
    text = model.detokenize(written).decode(errors='replace')
    print(json.dumps({'prompt': ids, 'written': written, 'text': text, 'logits': logits}))
