# Evaluate OpenAI's gpt2-medium (350M parameters) on OpenWebText, or on any dataset in GPT-2's
# tokens with --dataset.
#   python train.py config/eval_gpt2_medium.py
out_dir = 'out-eval-gpt2-medium'
init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # about 4,000 sequences, the same ones every time
batch_size = 8
