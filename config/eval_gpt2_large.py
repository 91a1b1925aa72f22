# Evaluate OpenAI's gpt2-large (774M parameters) on OpenWebText, or on any dataset in GPT-2's tokens
# with --dataset.
#   python train.py config/eval_gpt2_large.py
out_dir = 'out-eval-gpt2-large'
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500  # about 4,000 sequences, the same ones every time
batch_size = 8
