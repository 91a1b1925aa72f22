"""A small model, as a config file."""

n_layer = 1
n_head = 2
n_embd = 12
block_size = 16
batch_size = 4
gradient_accumulation_steps = 2
learning_rate = 1e-2
max_iters = 8
warmup_iters = 2
lr_decay_iters = 20
eval_interval = 4
log_interval = 1
dropout = 0.1
