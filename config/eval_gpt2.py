# Evaluate OpenAI's gpt2 (124M parameters) on OpenWebText, or on any dataset in GPT-2's tokens
# with --dataset.
#   python train.py config/eval_gpt2.py
out_dir = 'out-eval-gpt2'
init_from = 'gpt2'
eval_only = True
eval_iters = 500  # about 4,000 sequences, the same ones every time
batch_size = 8
