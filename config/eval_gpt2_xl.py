# Evaluate OpenAI's gpt2-xl (1558M parameters) on OpenWebText, or on any dataset in GPT-2's tokens
# with --dataset.
#   python train.py config/eval_gpt2_xl.py
out_dir = 'out-eval-gpt2-xl'
init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # about 4,000 sequences, the same ones every time
batch_size = 8
