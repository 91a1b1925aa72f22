# A size: 0.25M parameters with 65 characters; the quickest way to nanoGPT's loss for a CPU, in seconds:
#   python train.py config/train_shakespeare_char.py config/tiny.py
# Smaller and shallower than nanoGPT's 4 × 128: so little text is better read once by a small model than in part by a large one
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
