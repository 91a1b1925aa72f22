# A size: nanoGPT's README settings for a CPU, 0.8M parameters with 65 characters; seconds to minutes:
#   python train.py config/train_shakespeare_char.py config/tiny.py
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
dropout = 0.0
learning_rate = 1e-2
warmup_iters = 20
max_iters = 360
eval_interval = 120
