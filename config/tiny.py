# A size: 0.25M parameters with 65 characters. The fastest way to nanoGPT's loss on a CPU:
#   python train.py config/train_shakespeare_char.py config/tiny.py
# Smaller and shallower than nanoGPT's 4 × 128: with so few steps, a small model that sees all of
# the text reaches a lower loss than a large one that sees a part of it.
n_layer = 2
n_head = 3
n_embd = 96
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1
dropout = 0.0
learning_rate = 1e-2
warmup_iters = 20
max_iters = 270
eval_interval = 90
